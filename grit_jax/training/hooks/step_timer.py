"""How fast a run is, and how much of its time it is making steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import time
from typing import Any

import jax

from grit_jax.training.loop import StepReport

# What is summed over the steps between two reports.
SUMMED = ("tokens", "useful_flops", "data_wait_seconds", "compile_seconds")


class Goodput:
    """The share of the time since a run was first started in which it made the steps that it kept.

    What is no step: starting, compiling, measuring, being held up by a checkpoint, steps that are
    lost with their process and made again, and the time until the next start.

    Args:
      lines: of `metrics.jsonl`, those of the steps that are kept.
    """

    def __init__(self, lines: Sequence[Mapping[str, Any]]):
        self._first_start, self._in_steps = time.time(), 0.0
        for line in lines:
            if "goodput" in line:
                self._first_start = line["time"] - line["wall_seconds"]
                self._in_steps = line["goodput"] * line["wall_seconds"]

    def add(self, seconds: float) -> dict[str, float]:
        """Takes note of seconds in steps; returns "goodput" and what it takes to go on from it."""
        self._in_steps += seconds
        now = time.time()
        wall_seconds = max(now - self._first_start, self._in_steps)
        return {
            "time": now,
            "wall_seconds": wall_seconds,
            "goodput": self._in_steps / wall_seconds,
        }


class StepTimer:
    """A hook that turns every n-th step's metrics into numbers, with speed, and hands them on.

    The speed is that of the steps: compiling, and what is done in `pause`, is left out.

    Args:
      every_steps: n.
      stop: the last step, which is reported in any case.
      learning_rate: learning rate by the number of steps before that were not skipped.
      receivers: called with the step and its metrics as numbers.
      goodput: told of the seconds in steps.
      peak_flops: operations a second of all devices, for the model's FLOPs utilization ("mfu");
        None to leave it out.
    """

    def __init__(
        self,
        every_steps: int,
        stop: int,
        learning_rate: Callable[[int], Any],
        receivers: Sequence[Callable[[int, dict[str, float]], None]],
        goodput: Goodput,
        peak_flops: float | None = None,
    ):
        self._every_steps, self._stop = every_steps, stop
        self._learning_rate, self._receivers = learning_rate, receivers
        self._goodput, self._peak_flops = goodput, peak_flops
        self._begin()

    def _begin(self) -> None:
        self._since, self._steps, self._paused = time.perf_counter(), 0, 0.0
        self._sums = dict.fromkeys(SUMMED, 0.0)

    @contextlib.contextmanager
    def pause(self, report: StepReport) -> Iterator[None]:
        """A context whose time is no step's; the step that is being made is waited for first."""
        jax.block_until_ready(report.metrics)
        since = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - since

    def __call__(self, report: StepReport) -> None:
        """Takes note of a step."""
        self._steps += 1
        for name in SUMMED:
            self._sums[name] += report.metrics[name]
        if report.step % self._every_steps and report.step != self._stop:
            return
        # Fetching the loss waits for the step: the time covers the work, not its dispatch.
        metrics = {name: float(value) for name, value in report.metrics.items()}
        for name in ("data_wait_seconds", "useful_flops", "compile_seconds"):
            del metrics[name]
        elapsed = time.perf_counter() - self._since
        seconds = elapsed - self._paused - self._sums["compile_seconds"]
        # A step that is skipped does not move the schedule on.
        moved = report.step - 1 - int(metrics.get("steps_skipped", 0))
        metrics["learning_rate"] = float(self._learning_rate(moved))
        metrics["step_seconds"] = seconds / self._steps
        metrics["tokens_per_second"] = self._sums["tokens"] / seconds
        metrics["data_wait_fraction"] = self._sums["data_wait_seconds"] / seconds
        metrics["useful_tflops_per_second"] = self._sums["useful_flops"] / seconds / 1e12
        if self._peak_flops is not None:
            metrics["mfu"] = self._sums["useful_flops"] / seconds / self._peak_flops
        metrics |= self._goodput.add(seconds)
        for receive in self._receivers:
            receive(report.step, metrics)
        self._begin()
