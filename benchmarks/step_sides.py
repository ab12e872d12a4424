"""The two sides of `train_step.py`, each in a process of its own, and what they need for steps."""

from collections.abc import Sequence
import dataclasses
import multiprocessing
import os
import statistics
import time
from typing import Any

import numpy as np
from step_work import SETTINGS, Setting, StepTexts, full_steps, num_tokens, sample_steps

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
    """A side in a process of its own, with all of the cores whenever it is asked for something."""

    def __init__(self, side: str, preset: str, cases: Sequence[str]):
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
            raise SystemExit("the other process has ended; its error stands above") from None

    def close(self) -> None:
        """Ends the process."""
        self._connection.send(None)
        self._process.join()


def serve(connection: Any, side: str, preset: str, cases: Sequence[str]) -> None:
    """Makes a side, and answers what it is asked until there is no more."""
    setting = SETTINGS[preset]
    made = SIDES[side]()(setting, make_cases(setting, cases))
    while (request := connection.recv()) is not None:
        method, arguments = request
        began = time.process_time()
        answer = getattr(made, method)(*arguments)
        if method == "step":
            answer["cpu_seconds"] = time.process_time() - began
        connection.send(answer)


def make_cases(setting: Setting, cases: Sequence[str]) -> dict[str, list[StepTexts]]:
    """Returns the steps of each case."""
    return {case: CASES[case](setting) for case in cases}


@dataclasses.dataclass
class Measured:
    """What one side needed for the steps of one case.

    Attributes:
      seconds: of each step.
      cpu_seconds: of all threads of the process, which others on the machine disturb less.
      tokens: of real text, of each step.
      useful_flops: of each step, and of the device in a second where that is known.
      peak_memory: bytes on the device, where it says.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    useful_flops: list[float] = dataclasses.field(default_factory=list)
    peak_flops: float | None = None
    peak_memory: float | None = None

    @property
    def rate(self) -> float:
        """Tokens of real text a second: the median over steps."""
        return statistics.median(np.array(self.tokens) / np.array(self.seconds))

    @property
    def useful_rate(self) -> float:
        """Useful operations a second: the median over steps."""
        return statistics.median(np.array(self.useful_flops) / np.array(self.seconds))


def measure(
    preset: str, cases: Sequence[str], sides: Sequence[str], rounds: int
) -> dict[tuple[str, str], Measured]:
    """Returns what was measured by case and side.

    Sides take turns, but where only one model has room on the device one follows the other.
    """
    together = [sides] if preset != "7b" else [[side] for side in sides]
    measured: dict[tuple[str, str], Measured] = {}
    steps = make_cases(SETTINGS[preset], cases)
    for group in together:
        remotes = {side: Remote(side, preset, cases) for side in group}
        for case in cases:
            numbers = [number % len(steps[case]) for number in range(rounds)]
            for remote in remotes.values():
                for number in sorted(set(numbers)):  # Compiles, and takes the memory.
                    remote.ask("step", case, number)
            for number in numbers:
                for side, remote in remotes.items():
                    own = measured.setdefault((case, side), Measured())
                    step = remote.ask("step", case, number)
                    own.seconds.append(step["seconds"])
                    own.cpu_seconds.append(step["cpu_seconds"])
                    own.tokens.append(num_tokens(steps[case][number]))
                    own.peak_memory = remote.ask("peak_memory")
        add_useful_flops(measured, remotes, rounds, steps)
        for remote in remotes.values():
            remote.close()
    for (case, _), own in measured.items():
        ours = measured.get((case, "grit-jax"), own)
        own.useful_flops, own.peak_flops = ours.useful_flops, ours.peak_flops
    return measured


def add_useful_flops(
    measured: dict[tuple[str, str], Measured],
    remotes: dict[str, Remote],
    rounds: int,
    steps: dict[str, list[StepTexts]],
) -> None:
    """Notes the useful operations of each step, which are the same for both sides."""
    if "grit-jax" not in remotes:
        return
    for case in steps:
        own = measured[case, "grit-jax"]
        own.peak_flops = remotes["grit-jax"].ask("peak_flops")
        own.useful_flops = [
            remotes["grit-jax"].ask("useful_flops", case, number % len(steps[case]))
            for number in range(rounds)
        ]


def has_gpu() -> bool:
    """Returns whether JAX finds a GPU, looking in a process of its own: this one takes none."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_platform) == "gpu"


def _platform() -> str:
    import jax

    return jax.default_backend()
