"""The speed of a run, and the share of its time that goes into steps (goodput)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import time
from typing import Any

import jax

from grit_jax.training.loop import StepReport

# Metrics that are summed over the steps between two reports.
SUMMED = ("tokens", "useful_flops", "data_wait_seconds", "compile_seconds")


class Goodput:
    """The share of the time since the first start of a run that went into its steps.

    The rest is startup, compilation, evaluation, waiting for checkpoints, steps that were lost and
    repeated, and the time between a stop and the next start.

    Args:
      lines: the lines of `metrics.jsonl` from earlier starts.
    """

    def __init__(self, lines: Sequence[Mapping[str, Any]]):
        self._first_start, self._in_steps = time.time(), 0.0
        for line in lines:
            if "goodput" in line:
                self._first_start = line["time"] - line["wall_seconds"]
                self._in_steps = line["goodput"] * line["wall_seconds"]

    def add(self, seconds: float) -> dict[str, float]:
        """Adds seconds spent in steps; returns "goodput", "time" and "wall_seconds" as metrics."""
        self._in_steps += seconds
        now = time.time()
        wall_seconds = max(now - self._first_start, self._in_steps)
        return {
            "time": now,
            "wall_seconds": wall_seconds,
            "goodput": self._in_steps / wall_seconds,
        }


class StepTimer:
    """A hook that reports metrics and speed every `every_steps` steps.

    The speed covers steps only, without compilation and without the time in `pause`.

    Args:
      every_steps: steps between reports.
      stop: the last step, which is always reported.
      learning_rate: learning rate as a function of the number of earlier steps that were not
        skipped.
      receivers: called with the step and its metrics as Python floats.
      goodput: the goodput of the run.
      peak_flops: peak FLOPs per second of all devices, for the model FLOPs utilization ("mfu"),
        or None to leave it out.
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
        """A context manager whose time is left out, after waiting for the current step."""
        jax.block_until_ready(report.metrics)
        since = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - since

    def __call__(self, report: StepReport) -> None:
        """Adds a step, and reports it if it is due."""
        self._steps += 1
        for name in SUMMED:
            self._sums[name] += report.metrics[name]
        if report.step % self._every_steps and report.step != self._stop:
            return
        # Converting to float waits for the step, so that the time covers its computation.
        metrics = {name: float(value) for name, value in report.metrics.items()}
        for name in ("data_wait_seconds", "useful_flops", "compile_seconds"):
            del metrics[name]
        elapsed = time.perf_counter() - self._since
        seconds = elapsed - self._paused - self._sums["compile_seconds"]
        # Skipped steps do not advance the schedule.
        advanced = report.step - 1 - int(metrics.get("steps_skipped", 0))
        metrics["learning_rate"] = float(self._learning_rate(advanced))
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
