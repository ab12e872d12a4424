"""The loop: batches in, steps made, and hooks that look on."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from grit_jax.data.batch import Batch
from grit_jax.training.flops import useful_flops
from grit_jax.training.train_step import Trainer, TrainState

# What is summed over the steps between two reports.
SUMMED = ("tokens", "useful_flops", "data_wait_seconds")


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What a hook is told after a step.

    Attributes:
      step: number of steps made.
      state: the state after it.
      metrics: values of the step on the device, `tokens`, the real tokens it read,
        `useful_flops`, the operations that they need (see `flops`), and `data_wait_seconds`, for
        which the devices waited for the next batch.
    """

    step: int
    state: TrainState
    metrics: dict[str, Any]


Hook = Callable[[StepReport], None]


def train(
    trainer: Trainer,
    state: TrainState,
    batches: Iterator[Batch],
    hooks: Sequence[Hook],
    say: Callable[[str], None],
) -> TrainState:
    """Makes a step of every batch and returns the last state.

    Args:
      trainer: makes the steps.
      state: the state to go on from; its memory is given to the steps.
      batches: the batches from the state's step on.
      hooks: called after each step, in order.
      say: told of each shape that has to be compiled.
    """
    step = int(state.step)
    is_causal = trainer.loss_config.attention[1] == "c"
    compiled = set()
    with jax.set_mesh(trainer.mesh):
        coming = next(batches, None)
        placed = trainer.to_devices(coming)
        while coming is not None:
            batch = coming
            rows = {name: shape for name, shape in batch_rows(batch).items() if shape}
            is_new = tuple(rows.items()) not in compiled
            if is_new:
                say(f"compiling for rows of {', '.join(f'{k} {v}' for k, v in rows.items())} ...")
                compiled.add(tuple(rows.items()))
            started = time.perf_counter()
            state, metrics = trainer.step(state, placed)
            if is_new:
                say(f"compiled in {time.perf_counter() - started:.1f} s")
            step += 1
            # The next batch is read and goes to the devices while they make this step.
            started = time.perf_counter()
            coming = next(batches, None)
            waited = time.perf_counter() - started if metrics["loss"].is_ready() else 0.0
            placed = trainer.to_devices(coming)
            counts = {
                "tokens": count_tokens(batch),
                "useful_flops": useful_flops(trainer.model_config, batch, is_causal=is_causal),
                "data_wait_seconds": waited,
            }
            report = StepReport(step, state, {**metrics, **counts})
            for hook in hooks:
                hook(report)
    return state


def batch_rows(batch: Batch) -> dict[str, str]:
    """Returns the shape of each stream's rows on all hosts, as words."""
    return {
        name: f"{texts.num_rows or len(texts.tokens)}x{texts.tokens.shape[1]}"
        for name, texts in _streams(batch)
    }


def count_tokens(batch: Batch) -> int:
    """Returns the number of tokens on all hosts that are not padding."""
    if batch.num_tokens is not None:
        return int(batch.num_tokens)
    return sum(int(np.count_nonzero(texts.segment_ids)) for _, texts in _streams(batch))


def _streams(batch: Batch):
    if batch.embedding is not None:
        yield "queries", batch.embedding.queries
        yield "passages", batch.embedding.passages
    if batch.chats is not None:
        yield "chats", batch.chats


class Stopwatch:
    """A hook that turns every n-th step's metrics into numbers, with speed, and hands them on.

    Args:
      every_steps: n.
      stop: the last step, which is reported in any case.
      learning_rate: learning rate of a step.
      receivers: called with the step and its metrics as numbers.
      peak_flops: operations a second of all devices, for the model's FLOPs utilization ("mfu");
        None to leave it out.
    """

    def __init__(
        self,
        every_steps: int,
        stop: int,
        learning_rate: Callable[[int], Any],
        receivers: Sequence[Callable[[int, dict[str, float]], None]],
        peak_flops: float | None = None,
    ):
        self._every_steps, self._stop = every_steps, stop
        self._learning_rate, self._receivers = learning_rate, receivers
        self._peak_flops = peak_flops
        self._begin()

    def _begin(self) -> None:
        self._since, self._steps = time.perf_counter(), 0
        self._sums = dict.fromkeys(SUMMED, 0.0)

    def __call__(self, report: StepReport) -> None:
        """Takes note of a step."""
        self._steps += 1
        for name in SUMMED:
            self._sums[name] += report.metrics[name]
        if report.step % self._every_steps and report.step != self._stop:
            return
        # Fetching the loss waits for the step: the time covers the work, not its dispatch.
        metrics = {name: float(value) for name, value in report.metrics.items()}
        for name in ("data_wait_seconds", "useful_flops"):
            del metrics[name]
        seconds = time.perf_counter() - self._since
        metrics["learning_rate"] = float(self._learning_rate(report.step - 1))
        metrics["step_seconds"] = seconds / self._steps
        metrics["tokens_per_second"] = self._sums["tokens"] / seconds
        metrics["data_wait_fraction"] = self._sums["data_wait_seconds"] / seconds
        metrics["useful_tflops_per_second"] = self._sums["useful_flops"] / seconds / 1e12
        if self._peak_flops is not None:
            metrics["mfu"] = self._sums["useful_flops"] / seconds / self._peak_flops
        for receive in self._receivers:
            receive(report.step, metrics)
        self._begin()


IN_A_ROW = "steps_skipped_in_a_row"


class NotFiniteError(Exception):
    """The gradient was not finite too many steps in a row."""


class SkippedSteps:
    """A hook that stops a run whose steps are skipped, because their gradient is not finite.

    It looks at the step before, which is over: waiting for the last would leave the devices idle.

    Args:
      most: how many in a row are borne.
    """

    def __init__(self, most: int):
        self._most = most
        self._before: tuple[int, Any] | None = None

    def __call__(self, report: StepReport) -> None:
        """Takes note of a step.

        Raises:
          NotFiniteError: there were more than `most` in a row.
        """
        before, self._before = self._before, (report.step, report.metrics[IN_A_ROW])
        if before is None or int(before[1]) <= self._most:
            return
        raise NotFiniteError(
            f"the gradients of the last {self._most + 1} steps up to step {before[0]} are not "
            "finite, and were skipped: lower config.optimizer.learning_rate, or look at the data "
            "of these steps. The parameters are those from before"
        )
