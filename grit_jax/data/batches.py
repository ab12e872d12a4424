"""The batch of any step. Every host plans the whole batch and reads only its own rows."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools
from typing import Any

import grain
from jaxtyping import Int
import numpy as np

from grit_jax.data.batch import Batch, PackedTexts
from grit_jax.data.batch_plan import BatchPlan, BatchPlanner, StreamPlan
from grit_jax.data.kinds import BATCH_KINDS, SampledExamples
from grit_jax.data.manifest import PreparedDataset
from grit_jax.data.packing import pack
from grit_jax.data.sampling import Sampler, describe_sampler
from grit_jax.data.shapes import RowLimits, Shape
from grit_jax.text.examples import Text
from grit_jax.text.kinds import TEXT_KINDS


class Batches:
    """The batches of a run, by step: a pure function of the arguments and the step.

    Rows are split evenly into `limits.count_multiple` shards, in order. The global batch is
    byte-identical for any number of hosts.

    Args:
      samplers: the sampler of each kind of text that is trained.
      limits: limits of the rows.
      local_shards: indices of the shards of rows that this host reads; by default all.
      duplicate_positives_are_negatives: whether copies of a query's positive count as negatives,
        as in the original implementation.
      same_query_positives_are_negatives: whether the positives of other examples with the same
        query count as negatives, as in the original implementation.

    Raises:
      PreparedDataError: a dataset has a text that is longer than the maximum row length.
    """

    def __init__(
        self,
        samplers: Mapping[str, Sampler],
        limits: RowLimits,
        local_shards: Sequence[int] | None = None,
        duplicate_positives_are_negatives: bool = False,
        same_query_positives_are_negatives: bool = False,
    ):
        self.plans = BatchPlanner(samplers, limits)
        self.samplers, self._limits = samplers, limits
        self._local_shards = range(limits.count_multiple) if local_shards is None else local_shards
        self._duplicate_positives_are_negatives = duplicate_positives_are_negatives
        self._same_query_positives_are_negatives = same_query_positives_are_negatives

    @property
    def description(self) -> dict[str, Any]:
        """Everything that the batches depend on, except the seed and the shape of the rows."""
        return {kind: describe_sampler(sampler) for kind, sampler in self.samplers.items()}

    @property
    def datasets(self) -> list[PreparedDataset]:
        """The datasets of all samplers."""
        return [dataset for sampler in self.samplers.values() for dataset in sampler.datasets]

    def passes(self, num_steps: int) -> dict[str, float]:
        """Returns how many times a number of steps reads each dataset, by its name."""
        found = {}
        for sampler in self.samplers.values():
            described = describe_sampler(sampler)
            turns = {name: each["turns"] for name, each in described["datasets"].items()}
            num_examples = num_steps * sampler.batch_size
            for dataset in sampler.datasets:
                share = turns[dataset.name] / sum(turns.values())
                found[dataset.name] = num_examples * share / len(dataset)
        return found

    @property
    def shapes(self) -> list[Shape]:
        """The shapes that steps may have."""
        return self.plans.shapes

    def __getitem__(self, step: int) -> Batch:
        """Returns the batch of step `step`: this host's rows, and all arrays that are not rows.

        Raises:
          PreparedDataError: a shard of records is missing or damaged; the message names it.
        """
        return self._read(self.plans[step], self._local_shards)

    def empty(self, shape: Shape) -> Batch:
        """Returns the whole batch of a shape, without texts, to trace a program with."""
        return self._read(self.plans.empty(shape), range(self._limits.count_multiple))

    def _read(self, plan: BatchPlan, shards: Sequence[int]) -> Batch:
        parts = {}
        for kind, sampled in plan.sampled.items():
            sampler = self.samplers[kind]
            parts[kind] = BATCH_KINDS[kind].make_part(
                self._pack(plan, shards, kind),
                sampled,
                sampler.datasets,
                sampler.group_size,
                self._duplicate_positives_are_negatives,
                self._same_query_positives_are_negatives,
            )
        return Batch(parts, np.array(plan.num_tokens, np.int32))

    def _pack(self, plan: BatchPlan, shards: Sequence[int], kind: str) -> dict[str, PackedTexts]:
        """Returns the rows of the streams of a kind in these shards; each example is read once."""
        names = TEXT_KINDS[kind].streams
        rows = {name: self._rows_of_shards(plan, shards, name) for name in names}
        indices = {name: sorted(itertools.chain.from_iterable(rows[name])) for name in names}
        wanted = [plan.streams[name].examples[indices[name]] for name in names]
        texts = self._read_texts(kind, plan.sampled[kind], np.unique(np.concatenate(wanted)))
        packed = {}
        for name in names:
            stream, shape = plan.streams[name], plan.shape[name]
            own = {index: texts[_text_key(stream, index)] for index in indices[name]}
            packed[name] = dataclasses.replace(
                pack(own, rows[name], len(rows[name]), shape.length, len(stream.texts)),
                num_rows=shape.count,
            )
        return packed

    def _rows_of_shards(self, plan: BatchPlan, shards: Sequence[int], name: str) -> list[list[int]]:
        """Returns the rows of these shards, including empty rows."""
        count = plan.shape[name].count
        rows = plan.streams[name].rows
        rows = [*rows, *([[]] * (count - len(rows)))]
        size = count // self._limits.count_multiple
        return [row for shard in shards for row in rows[shard * size : (shard + 1) * size]]

    def _read_texts(
        self, kind: str, sampled: SampledExamples, wanted: Int[np.ndarray, " wanted"]
    ) -> dict[tuple[int, int], Text]:
        """Reads the examples at indices `wanted` of `sampled`.

        Returns:
          The texts, by the index of the example in `sampled` and the index of the text in its
          dataset.
        """
        texts = {}
        for index, dataset in enumerate(self.samplers[kind].datasets):
            own = wanted[sampled.datasets[wanted] == index]
            if not len(own):
                continue
            in_dataset = sampled.examples[own].tolist()
            read = dataset.read(in_dataset)
            for sample, example_index, example in zip(own, in_dataset, read, strict=True):
                first = int(dataset.lengths.first[example_index])
                texts |= {(int(sample), first + i): text for i, text in enumerate(example.texts)}
        return texts


def _text_key(stream: StreamPlan, index: int) -> tuple[int, int]:
    return int(stream.examples[index]), int(stream.texts[index])


class _StepSource:
    """A Grain data source of the batches of steps `start` to `stop`."""

    def __init__(self, batches: Batches, start: int, stop: int):
        self._batches, self._start, self._stop = batches, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> Batch:
        return self._batches[self._start + index]


def read_ahead(
    batches: Batches, start: int, stop: int, threads: int = 2, ahead: int = 4
) -> Iterator[Batch]:
    """Yields the batches of steps `start` to `stop`, read and packed ahead of time by Grain.

    Their content does not depend on the number of threads.

    Args:
      batches: the batches.
      start: the first step.
      stop: one past the last step.
      threads: reader threads; nearly all of their work releases Python's global lock.
      ahead: batches to buffer; at least one per thread.
    """
    source = grain.MapDataset.source(_StepSource(batches, start, stop))
    # Grain would not use more threads than the buffer has slots.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
    return iter(source.to_iter_dataset(options))
