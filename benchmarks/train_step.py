"""Measures the joint step: python benchmarks/train_step.py [--preset 124m|7b|tiny] [--profile]

Runs the same steps with grit-jax, and with `transformers` and torch. The sides alternate, each turn
in a new process that makes several consecutive steps; the first step of each shape is not counted.
Case "full": all texts of a stream have equal length and fill their rows. Case "sample": lengths of
the embedded sample, packed by grit-jax, padded to the longest text of each stream by torch.

    --check             both sides run the same steps of a tiny model and compare losses, parameters
    --profile           operations, memory and time of grit-jax's step, and the speed of products
    --measure-lengths   rewrites sample_lengths.npz from the output of `make demo` in data/sample

Only the last needs the data pipeline. `--preset 124m` needs 11 GB of memory, `--preset 7b` a GPU.
"""

import argparse
from collections.abc import Sequence
import dataclasses
from pathlib import Path
import statistics
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from step_sides import CASES, SIDES, Measured, Remote, has_gpu, jax_side, measure, torch_side
from step_work import SETTINGS, TINY, measure_lengths

# Tolerances between the sides after some steps: losses, and parameter updates.
LOSS_TOLERANCE, MOVE_TOLERANCE = 1e-5, 1e-3


def main() -> None:
    """Runs what the options select."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=SETTINGS, default="124m")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=3, help="steps of a case in a turn (3)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side (3)")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--measure-lengths", type=Path, nargs="?", const="data/sample")
    options = parser.parse_args()
    if options.measure_lengths:
        measure_lengths(options.measure_lengths)
    elif options.check:
        check()
    elif options.preset == "7b" and not has_gpu():
        raise SystemExit("--preset 7b needs a GPU, and JAX finds none")
    elif options.profile:
        Console().print(profile_table(options.preset, options.cases))
    else:
        measured = measure(
            options.preset, options.cases, options.sides, options.rounds, options.repeats
        )
        Console(width=110).print(speed_table(options.preset, measured))


def speed_table(preset: str, measured: dict[tuple[str, str], Measured]) -> Table:
    """Returns the step time for each case and side, and the ratio of the medians."""
    table = Table(title=f"joint step, {preset}, {SETTINGS[preset].dtype}")
    for column in ("case", "side", "s per step", "min", "max", "tokens/s", "speedup"):
        table.add_column(column, justify="left" if column in ("case", "side") else "right")
    table.add_column("useful GFLOP/s", justify="right")
    table.add_column("MFU", justify="right")
    table.add_column("peak GB", justify="right")
    for (case, side), own in measured.items():
        slowest = measured.get((case, "torch"), own)
        table.add_row(
            case,
            side,
            f"{statistics.median(own.seconds):.2f}",
            f"{min(own.seconds):.2f}",
            f"{max(own.seconds):.2f}",
            f"{own.rate:,.0f}",
            f"{own.rate / slowest.rate:.2f}",
            f"{own.useful_rate / 1e9:,.0f}" if own.useful_flops else "",
            f"{own.useful_rate / own.peak_flops:.1%}" if own.peak_flops else "",
            f"{own.peak_memory / 1e9:.1f}" if own.peak_memory else "",
        )
    return table


def profile_table(preset: str, cases: Sequence[str]) -> Table:
    """Returns operations, memory and time of grit-jax's step in each case."""
    remote = Remote("grit-jax", preset, cases)
    profiles = {case: remote.ask("profile", case) for case in cases}
    remote.close()
    table = Table(title=f"grit-jax, joint step, {preset}")
    for column in ("", *cases):
        table.add_column(column, justify="right" if column else "left")
    for name in next(iter(profiles.values())):
        unit, scale = ("s", 1.0) if name.endswith("seconds") else ("G", 1e9)
        values = [f"{profiles[case][name] / scale:,.2f} {unit}" for case in cases]
        table.add_row(name, *values)
    return table


def check() -> None:
    """Runs the same steps on both sides from equal parameters, and compares them.

    Raises:
      SystemExit: losses or parameters differ by more than rounding.
    """
    import torch

    setting = dataclasses.replace(TINY, dtype="float32", remat="none", learning_rate=1e-3)
    cases = {case: steps(setting) for case, steps in CASES.items()}
    ours, theirs = jax_side()(setting, cases), torch_side()(setting, cases)
    start = ours.tensors()
    theirs.model.load_state_dict({name: torch.tensor(value) for name, value in start.items()})
    for case in cases:
        losses = [side.step(case, 0) for side in (ours, theirs)]
        for name in ("embedding_loss", "generative_loss"):
            own, other = (loss[name] for loss in losses)
            compare(f"{case}: {name} {own:.6f}", own - other, other, LOSS_TOLERANCE)
    moved = {name: after - start[name] for name, after in ours.tensors().items()}
    for name, parameter in theirs.model.named_parameters():
        difference = parameter.detach().numpy() - start[name] - moved[name]
        compare(f"move of {name}", difference, moved[name], MOVE_TOLERANCE)
    print("both sides agree")


def compare(name: str, difference: Any, value: Any, tolerance: float) -> None:
    """Prints a difference next to a value.

    Raises:
      SystemExit: the difference is more than `tolerance` times the value.
    """
    relative = np.linalg.norm(difference) / np.linalg.norm(value)
    print(f"{name}: the sides differ by {relative:.1e}")
    if not relative <= tolerance:
        raise SystemExit(f"{name}: more than {tolerance:.0e}")


if __name__ == "__main__":
    main()
