"""The training loop: takes a step per batch and calls hooks after each."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from grit_jax.data.batch import Batch
from grit_jax.training.flops import useful_flops
from grit_jax.training.loss import Loss
from grit_jax.training.train_step import Trainer, TrainState


@dataclasses.dataclass(frozen=True)
class StepReport:
    """The argument of a hook.

    Attributes:
      step: number of steps taken.
      state: the state after the step.
      metrics: the losses and other values of the step, on the devices; `tokens`, the number of
        tokens without padding; `useful_flops`, the operations that these tokens need (see `flops`);
        `data_wait_seconds`, the time that the devices waited for the next batch; and
        `compile_seconds`.
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
    log: Callable[[str], None],
) -> TrainState:
    """Takes a step for every batch and returns the last state.

    Args:
      trainer: the trainer.
      state: the state to continue from; its memory is donated.
      batches: the batches from the state's step on.
      hooks: called after each step, in order.
      log: called with a message for each shape of rows that is compiled.
    """
    step = int(state.step)
    compiled = set()
    with jax.set_mesh(trainer.mesh):
        next_batch = next(batches, None)
        on_devices = trainer.to_devices(next_batch)
        while next_batch is not None:
            batch = next_batch
            rows = ", ".join(f"{name} {shape}" for name, shape in batch_rows(batch).items())
            is_new = rows not in compiled
            if is_new:
                log(f"compiling for rows of {rows} ...")
                compiled.add(rows)
            started = time.perf_counter()
            state, metrics = trainer.step(state, on_devices)
            compile_seconds = time.perf_counter() - started if is_new else 0.0
            if is_new:
                log(f"compiled in {compile_seconds:.1f} s")
            step += 1
            # The next batch is read and sent to the devices while they compute this step.
            started = time.perf_counter()
            next_batch = next(batches, None)
            waited = time.perf_counter() - started if metrics["loss"].is_ready() else 0.0
            on_devices = trainer.to_devices(next_batch)
            causal = causal_streams(trainer.loss, batch)
            counts = {
                "tokens": count_tokens(batch),
                "useful_flops": useful_flops(trainer.model_config, batch, causal),
                "data_wait_seconds": waited,
                "compile_seconds": compile_seconds,
            }
            report = StepReport(step, state, {**metrics, **counts})
            for hook in hooks:
                hook(report)
    return state


def batch_rows(batch: Batch) -> dict[str, str]:
    """Returns the number and length of each stream's rows on all hosts, as ROWSxLENGTH."""
    return {
        name: f"{texts.num_rows or len(texts.tokens)}x{texts.tokens.shape[1]}"
        for name, texts in batch.streams.items()
    }


def count_tokens(batch: Batch) -> int:
    """Returns the number of tokens on all hosts, without padding."""
    if batch.num_tokens is not None:
        return int(batch.num_tokens)
    return sum(int(np.count_nonzero(texts.segment_ids)) for texts in batch.streams.values())


def causal_streams(loss: Loss, batch: Batch) -> set[str]:
    """Returns the streams of a batch that have causal attention."""
    return {name for name, stream in loss.streams(batch).items() if stream.is_causal}


class NotFiniteError(Exception):
    """The gradient was not finite in too many consecutive steps."""


class SkipGuard:
    """A hook that stops a run if too many consecutive steps are skipped (see `make_optimizer`).

    It checks the previous step: waiting for the current step would leave the devices idle.

    Args:
      max_consecutive_skips: number of consecutive skipped steps that are allowed.
    """

    def __init__(self, max_consecutive_skips: int):
        self._max_consecutive_skips = max_consecutive_skips
        self._previous: tuple[int, Any] | None = None

    def __call__(self, report: StepReport) -> None:
        """Checks the previous step and remembers this one.

        Raises:
          NotFiniteError: more than `max_consecutive_skips` consecutive steps were skipped.
        """
        previous = self._previous
        self._previous = report.step, report.metrics["steps_skipped_in_a_row"]
        if previous is None or int(previous[1]) <= self._max_consecutive_skips:
            return
        raise NotFiniteError(
            f"the gradients of the last {self._max_consecutive_skips + 1} steps up to step "
            f"{previous[0]} are not finite, and the steps were skipped: lower "
            "config.optimizer.learning_rate, or look at the data of these steps. The parameters "
            "are those from before"
        )
