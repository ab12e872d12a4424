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
# 7B needs more GPU memory than JAX preallocates by default.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")


def jax_side() -> type:
    """Returns the grit-jax side."""
    from jax_step import JaxSide

    return JaxSide


def torch_side() -> type:
    """Returns the torch side."""
    from torch_step import TorchSide

    return TorchSide


# Each process imports only what its side needs.
SIDES = {"torch": torch_side, "grit-jax": jax_side}


class Remote:
    """A side in its own process, which `close` ends."""

    def __init__(self, side: str, preset: str, cases: Sequence[str]):
        self.side = side
        context = multiprocessing.get_context("spawn")
        self._connection, far_end = context.Pipe()
        arguments = (far_end, side, preset, cases)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        far_end.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Returns the result of a method of the side."""
        self._connection.send((method, arguments))
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()  # Wait for the error message.
            raise SystemExit("the other process has ended; its error stands above") from None

    def close(self) -> None:
        """Ends the process."""
        self._connection.send(None)
        self._process.join()


def serve(connection: Any, side: str, preset: str, cases: Sequence[str]) -> None:
    """Creates a side, and answers requests until the connection closes."""
    setting = SETTINGS[preset]
    made = SIDES[side]()(setting, {case: CASES[case](setting) for case in cases})
    while (request := connection.recv()) is not None:
        method, arguments = request
        connection.send(getattr(made, method)(*arguments))


@dataclasses.dataclass
class Measured:
    """Measurements of one side in one case.

    Attributes:
      seconds: seconds of each step.
      tokens: real tokens of each step.
      useful_flops: useful operations of each step, and the device's FLOP/s if known.
      peak_memory: peak bytes on the device, if known.
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
        """Real tokens per second, the median over steps."""
        return statistics.median(np.array(self.tokens) / np.array(self.seconds))

    @property
    def useful_rate(self) -> float:
        """Useful FLOP/s, the median over steps."""
        return statistics.median(np.array(self.useful_flops) / np.array(self.seconds))


def measure(
    preset: str, cases: Sequence[str], sides: Sequence[str], rounds: int, repeats: int
) -> dict[tuple[str, str], Measured]:
    """Returns the measurements by case and side.

    Args:
      preset: name of the model.
      cases: cases to measure.
      sides: sides, which alternate.
      rounds: consecutive steps of a case per turn.
      repeats: turns of each side, each in a new process.
    """
    measured: dict[tuple[str, str], Measured] = {}
    steps = {case: CASES[case](SETTINGS[preset]) for case in cases}
    for side in list(sides) * repeats:
        remote = Remote(side, preset, cases)
        for case in cases:
            numbers = [number % len(steps[case]) for number in range(rounds)]
            for number in sorted(set(numbers)):  # Compiles and allocates memory.
                remote.ask("step", case, number)
            own = measured.setdefault((case, side), Measured())
            for number in numbers:
                own.add(remote, case, number, num_tokens(steps[case][number]))
        remote.close()
    for (case, _), own in measured.items():  # Both sides do the same work.
        ours = measured.get((case, "grit-jax"), own)
        own.useful_flops, own.peak_flops = ours.useful_flops, ours.peak_flops
    return dict(sorted(measured.items(), key=lambda item: list(cases).index(item[0][0])))


def has_gpu() -> bool:
    """Returns whether JAX finds a GPU; uses a subprocess, so that this process takes none."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_platform) == "gpu"


def _platform() -> str:
    import jax

    return jax.default_backend()
