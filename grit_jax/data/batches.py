"""The batch of any step: planned whole, of which a host reads the rows that it holds."""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
from typing import Any

import grain
import numpy as np

from grit_jax.data.batch import Batch, EmbeddingBatch, PackedTexts
from grit_jax.data.batch_plan import Plan, Planner, StreamPlan, deduplicated_ids
from grit_jax.data.manifest import PreparedDataset
from grit_jax.data.packing import pack
from grit_jax.data.sampling import SampledExamples, Stream, describe
from grit_jax.data.shapes import RowLimits, Shape
from grit_jax.text.examples import Text


class Batches:
    """The batches of a run by step; a pure function of the arguments and the step.

    Rows are split evenly into `limits.count_multiple` shards, in order. What the hosts read, put
    together by shard, is the same to the byte for any number of hosts.

    Args:
      streams: where examples come from: "embedding" or "generative" or both.
      limits: what rows may be.
      local_shards: numbers of the shards of rows that this host reads; all by default.
      duplicate_positives_are_negatives: whether copies of a query's positive count as negatives,
        as in the original.

    Raises:
      PreparedDataError: a dataset has a text that is longer than a row may be.
    """

    def __init__(
        self,
        streams: dict[str, Stream],
        limits: RowLimits,
        local_shards: Sequence[int] | None = None,
        duplicate_positives_are_negatives: bool = False,
    ):
        self.plans = Planner(streams, limits)
        self._streams, self._limits = streams, limits
        self._held = range(limits.count_multiple) if local_shards is None else local_shards
        self._copies_are_negatives = duplicate_positives_are_negatives

    @property
    def description(self) -> dict[str, Any]:
        """What the batches depend on, but for the seed and the form of rows."""
        return {kind: describe(stream) for kind, stream in self._streams.items()}

    @property
    def datasets(self) -> list[PreparedDataset]:
        """The datasets of all streams."""
        return [dataset for stream in self._streams.values() for dataset in stream.datasets]

    @property
    def shapes(self) -> list[Shape]:
        """The shapes that steps may have."""
        return self.plans.shapes

    def __getitem__(self, step: int) -> Batch:
        """Returns the batch of step `step`: this host's rows, and all that is not rows.

        Raises:
          PreparedDataError: a shard of records is missing or damaged; the message names it.
        """
        return self._read(self.plans[step], self._held)

    def empty(self, shape: Shape) -> Batch:
        """Returns the whole batch of a shape, without texts: what a program can be traced with."""
        return self._read(self.plans.empty(shape), range(self._limits.count_multiple))

    def _read(self, plan: Plan, held: Sequence[int]) -> Batch:
        embedding = chats = None
        if "embedding" in plan.drawn:
            queries, passages = self._pack(plan, held, "embedding", ("query", "passage"))
            positives = np.arange(0, passages.num_texts, self._streams["embedding"].group_size)
            contents = self._passage_contents(plan)
            embedding = EmbeddingBatch(queries, passages, positives.astype(np.int32), contents)
        if "generative" in plan.drawn:
            (chats,) = self._pack(plan, held, "generative", ("chat",))
        return Batch(embedding, chats, np.array(plan.num_tokens, np.int32))

    def _pack(
        self, plan: Plan, held: Sequence[int], kind: str, names: tuple[str, ...]
    ) -> list[PackedTexts]:
        """Returns the rows of held shards of some streams, whose examples are read once."""
        rows = {name: self._held_rows(plan, held, name) for name in names}
        numbers = {name: sorted(itertools.chain.from_iterable(rows[name])) for name in names}
        draws = [plan.streams[name].draws[numbers[name]] for name in names]
        examples = self._read_examples(kind, plan.drawn[kind], np.unique(np.concatenate(draws)))
        packed = []
        for name in names:
            stream, num_rows = plan.streams[name], plan.shape[name]
            texts = {number: _text(examples, stream, number) for number in numbers[name]}
            packed.append(
                dataclasses.replace(
                    pack(texts, rows[name], len(rows[name]), num_rows.length, len(stream.texts)),
                    num_rows=num_rows.count,
                )
            )
        return packed

    def _held_rows(self, plan: Plan, held: Sequence[int], name: str) -> list[list[int]]:
        """Returns the rows of held shards, empty ones too."""
        count = plan.shape[name].count
        rows = plan.streams[name].rows
        rows = [*rows, *([[]] * (count - len(rows)))]
        size = count // self._limits.count_multiple
        return [row for shard in held for row in rows[shard * size : (shard + 1) * size]]

    def _read_examples(
        self, kind: str, drawn: SampledExamples, wanted: np.ndarray
    ) -> dict[tuple[int, int], Text]:
        """Returns the texts of the wanted examples among those drawn, by the numbers of both.

        A text's number is that among all texts of its dataset.
        """
        texts = {}
        for number, dataset in enumerate(self._streams[kind].datasets):
            own = wanted[drawn.datasets[wanted] == number]
            if not len(own):
                continue
            examples = drawn.examples[own].tolist()
            for draw, example, read in zip(own, examples, dataset.read(examples), strict=True):
                first = int(dataset.lengths.first[example])
                texts |= {(int(draw), first + place): t for place, t in enumerate(read.texts)}
        return texts

    def _passage_contents(self, plan: Plan) -> np.ndarray:
        drawn = plan.drawn["embedding"]
        passages = drawn.texts[:, 1:]
        is_used = passages.ravel() >= 0
        if self._copies_are_negatives:
            return np.where(is_used, np.arange(len(is_used)), -1).astype(np.int32)
        fingerprints = np.zeros(passages.shape, np.uint64)
        for number, dataset in enumerate(self._streams["embedding"].datasets):
            own = drawn.datasets == number
            fingerprints[own] = dataset.lengths.fingerprints[passages[own]]
        return deduplicated_ids(fingerprints.ravel(), is_used)


def _text(texts: dict[tuple[int, int], Text], stream: StreamPlan, number: int) -> Text:
    return texts[int(stream.draws[number]), int(stream.texts[number])]


class _FromStep:
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

    What they hold does not depend on the number of threads.

    Args:
      batches: the batches.
      start: the first step.
      stop: one past the last step.
      threads: threads that read; nearly all of their work is outside of Python's lock.
      ahead: batches held ready, and at least one a thread.
    """
    source = grain.MapDataset.source(_FromStep(batches, start, stop))
    # A thread without a place for its batch would do nothing.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
    return iter(source.to_iter_dataset(options))
