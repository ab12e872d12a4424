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


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What a hook is told after a step.

    Attributes:
      step: number of steps made.
      state: the state after it.
      metrics: values of the step on the device, `tokens`, the real tokens it read,
        `useful_flops`, the operations that they need (see `flops`), `data_wait_seconds`, for
        which the devices waited for the next batch, and `compile_seconds`.
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
    is_causal = trainer.loss_config.embedding.attention[1] == "c"
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
            compile_seconds = time.perf_counter() - started if is_new else 0.0
            if is_new:
                say(f"compiled in {compile_seconds:.1f} s")
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
                "compile_seconds": compile_seconds,
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


IN_A_ROW = "steps_skipped_in_a_row"


class NotFiniteError(Exception):
    """The gradient was not finite too many steps in a row."""


class SkipGuard:
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
