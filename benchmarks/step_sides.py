"""Runs the two sides of `train_step.py` in separate processes, and measures their steps."""

from collections.abc import Sequence
import dataclasses
import multiprocessing
import os
import statistics
from typing import Any

import numpy as np
from step_work import SETTINGS, full_steps, num_tokens, sample_steps

CASES = {"full": full_steps, "sample": sample_steps}
# 7B needs more of a GPU's memory than JAX allocates by default.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")


def jax_side() -> type:
    """Returns the class of grit-jax's side."""
    from jax_step import JaxSide

    return JaxSide


def torch_side() -> type:
    """Returns the class of torch's side."""
    from torch_step import TorchSide

    return TorchSide


# Functions, so that a process imports only its own side.
SIDES = {"torch": torch_side, "grit-jax": jax_side}


class Remote:
    """A side in a process of its own, which runs until `close`."""

    def __init__(self, side: str, preset: str, cases: Sequence[str]):
        self.side = side
        context = multiprocessing.get_context("spawn")
        self._connection, far_end = context.Pipe()
        arguments = (far_end, side, preset, cases)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        far_end.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the side and returns its result."""
        self._connection.send((method, arguments))
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()  # It may still be writing the error.
            raise SystemExit("the process of a side failed; see its error above") from None

    def close(self) -> None:
        """Ends the process."""
        self._connection.send(None)
        self._process.join()


def serve(connection: Any, side: str, preset: str, cases: Sequence[str]) -> None:
    """Creates a side, and answers requests until it receives None."""
    setting = SETTINGS[preset]
    made = SIDES[side]()(setting, {case: CASES[case](setting) for case in cases})
    while (request := connection.recv()) is not None:
        method, arguments = request
        connection.send(getattr(made, method)(*arguments))


@dataclasses.dataclass
class Measured:
    """Measurements of one side's steps of one case.

    Attributes:
      seconds: duration of each step.
      tokens: tokens of each step, without padding.
      useful_flops: useful operations of each step.
      peak_flops: peak operations per second of the device, if known.
      peak_memory: peak memory of the device in bytes, if known.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    useful_flops: list[float] = dataclasses.field(default_factory=list)
    peak_flops: float | None = None
    peak_memory: float | None = None

    def add(self, remote: Remote, case: str, number: int, tokens: int) -> None:
        """Runs a step and adds its measurements."""
        step = remote.ask("step", case, number)
        self.seconds.append(step["seconds"])
        self.tokens.append(tokens)
        self.peak_memory = remote.ask("peak_memory")
        if remote.side == "grit-jax":
            self.useful_flops.append(remote.ask("useful_flops", case, number))
            self.peak_flops = remote.ask("peak_flops")

    @property
    def rate(self) -> float:
        """Tokens per second, without padding: the median over steps."""
        return statistics.median(np.array(self.tokens) / np.array(self.seconds))

    @property
    def useful_rate(self) -> float:
        """Useful operations per second: the median over steps."""
        return statistics.median(np.array(self.useful_flops) / np.array(self.seconds))


def measure(
    preset: str, cases: Sequence[str], sides: Sequence[str], rounds: int, repeats: int
) -> dict[tuple[str, str], Measured]:
    """Returns the measurements by case and side.

    Args:
      preset: name of the model.
      cases: the cases to measure.
      sides: the sides, which alternate.
      rounds: consecutive steps of a case per process.
      repeats: processes of each side.
    """
    measured: dict[tuple[str, str], Measured] = {}
    steps = {case: CASES[case](SETTINGS[preset]) for case in cases}
    for side in list(sides) * repeats:
        remote = Remote(side, preset, cases)
        for case in cases:
            numbers = [number % len(steps[case]) for number in range(rounds)]
            for number in sorted(set(numbers)):  # Compiles and allocates.
                remote.ask("step", case, number)
            own = measured.setdefault((case, side), Measured())
            for number in numbers:
                own.add(remote, case, number, num_tokens(steps[case][number]))
        remote.close()
    for (case, _), own in measured.items():  # Both sides do the same useful work.
        ours = measured.get((case, "grit-jax"), own)
        own.useful_flops, own.peak_flops = ours.useful_flops, ours.peak_flops
    return dict(sorted(measured.items(), key=lambda item: list(cases).index(item[0][0])))


def has_gpu() -> bool:
    """Returns whether JAX finds a GPU; asks another process, so that this one does not use it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_platform) == "gpu"


def _platform() -> str:
    import jax

    return jax.default_backend()
