"""The two sides of `train_step.py`, each in processes of its own, and what they need for steps."""

from collections.abc import Sequence
import dataclasses
import multiprocessing
import os
import statistics
from typing import Any

import numpy as np
from step_work import SETTINGS, full_steps, num_tokens, sample_steps

CASES = {"full": full_steps, "sample": sample_steps}
# 7B needs more of a GPU's memory than JAX takes by itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")


def jax_side() -> type:
    """Returns the project's side."""
    from jax_step import JaxSide

    return JaxSide


def torch_side() -> type:
    """Returns torch's side."""
    from torch_step import TorchSide

    return TorchSide


# A process imports what its own side needs.
SIDES = {"torch": torch_side, "grit-jax": jax_side}


class Remote:
    """A side in a process of its own, which ends with `close`."""

    def __init__(self, side: str, preset: str, cases: Sequence[str]):
        self.side = side
        context = multiprocessing.get_context("spawn")
        self._connection, far_end = context.Pipe()
        arguments = (far_end, side, preset, cases)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        far_end.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Returns what a method of the side returns."""
        self._connection.send((method, arguments))
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()  # It is still writing the error.
            raise SystemExit("the other process has ended; its error stands above") from None

    def close(self) -> None:
        """Ends the process."""
        self._connection.send(None)
        self._process.join()


def serve(connection: Any, side: str, preset: str, cases: Sequence[str]) -> None:
    """Makes a side, and answers what it is asked until there is no more."""
    setting = SETTINGS[preset]
    made = SIDES[side]()(setting, {case: CASES[case](setting) for case in cases})
    while (request := connection.recv()) is not None:
        method, arguments = request
        connection.send(getattr(made, method)(*arguments))


@dataclasses.dataclass
class Measured:
    """What one side needed for the steps of one case.

    Attributes:
      seconds: of each step.
      tokens: of real text, of each step.
      useful_flops: of each step, and of the device in a second where that is known.
      peak_memory: bytes on the device, where it says.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    useful_flops: list[float] = dataclasses.field(default_factory=list)
    peak_flops: float | None = None
    peak_memory: float | None = None

    def add(self, remote: Remote, case: str, number: int, tokens: int) -> None:
        """Has a step made, and adds what it needed."""
        step = remote.ask("step", case, number)
        self.seconds.append(step["seconds"])
        self.tokens.append(tokens)
        self.peak_memory = remote.ask("peak_memory")
        if remote.side == "grit-jax":
            self.useful_flops.append(remote.ask("useful_flops", case, number))
            self.peak_flops = remote.ask("peak_flops")

    @property
    def rate(self) -> float:
        """Tokens of real text a second: the median over steps."""
        return statistics.median(np.array(self.tokens) / np.array(self.seconds))

    @property
    def useful_rate(self) -> float:
        """Useful operations a second: the median over steps."""
        return statistics.median(np.array(self.useful_flops) / np.array(self.seconds))


def measure(
    preset: str, cases: Sequence[str], sides: Sequence[str], rounds: int, repeats: int
) -> dict[tuple[str, str], Measured]:
    """Returns what was measured by case and side.

    Args:
      preset: names the model.
      cases: what to measure.
      sides: take turns.
      rounds: steps of a case that a side makes one after the other.
      repeats: turns of each side, each in a new process.
    """
    measured: dict[tuple[str, str], Measured] = {}
    steps = {case: CASES[case](SETTINGS[preset]) for case in cases}
    for side in list(sides) * repeats:
        remote = Remote(side, preset, cases)
        for case in cases:
            numbers = [number % len(steps[case]) for number in range(rounds)]
            for number in sorted(set(numbers)):  # Compiles, and takes the memory.
                remote.ask("step", case, number)
            own = measured.setdefault((case, side), Measured())
            for number in numbers:
                own.add(remote, case, number, num_tokens(steps[case][number]))
        remote.close()
    for (case, _), own in measured.items():  # The work is the same on both sides.
        ours = measured.get((case, "grit-jax"), own)
        own.useful_flops, own.peak_flops = ours.useful_flops, ours.peak_flops
    return dict(sorted(measured.items(), key=lambda item: list(cases).index(item[0][0])))


def has_gpu() -> bool:
    """Returns whether JAX finds a GPU, looking in a process of its own: this one takes none."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_platform) == "gpu"


def _platform() -> str:
    import jax

    return jax.default_backend()
