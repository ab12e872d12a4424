"""The global batch of any step: drawn, planned from lengths alone, read, and packed."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses

import grain
import numpy as np

from grit_jax.data.batch import Batch, EmbeddingBatch
from grit_jax.data.examples import Text
from grit_jax.data.manifest import PreparedDataError, PreparedDataset
from grit_jax.data.packing import pack, plan_rows
from grit_jax.data.schedule import Draw, Schedule, choose_passages

# Steps whose row counts are looked at to choose the shapes that a run compiles, and how much
# larger than the largest seen the spare shape is.
STEPS_LOOKED_AT = 64
SPARE_SHAPE = 1.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowLengths:
    """Tokens of a row of queries, of passages and of chats."""

    query: int
    passage: int
    chat: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step reads and how it lies in rows, for one or both streams.

    Attributes:
      dataset: where the embedding examples come from.
      draws: its examples.
      passages: for each query the numbers of its passages within the example, positive first.
      chat_dataset: where the chats come from.
      chat_draws: its examples.
      rows: for "query", "passage" and "chat" which texts share a row.
    """

    dataset: PreparedDataset | None
    draws: list[Draw]
    passages: list[list[int]]
    chat_dataset: PreparedDataset | None
    chat_draws: list[Draw]
    rows: dict[str, list[list[int]]]


class Batches:
    """The batches of a run by step; a pure function of the arguments and the step.

    Args:
      embedding: order of the embedding examples, or None to train without.
      generative: order of the chats, or None to train without.
      row_lengths: tokens of the rows.
      group_size: passages a query: a positive, and negatives as far as the example has them.
      row_multiple: row counts are multiples of this (the number of data shards).
      seed: of the draw of positives and negatives.

    Raises:
      PreparedDataError: a dataset has a text that is longer than its row.
    """

    def __init__(
        self,
        embedding: Schedule | None,
        generative: Schedule | None,
        *,
        row_lengths: RowLengths,
        group_size: int,
        row_multiple: int,
        seed: int,
    ):
        self.embedding = embedding
        self.generative = generative
        self.row_lengths = dataclasses.asdict(row_lengths)
        self.group_size = group_size
        self.row_multiple = row_multiple
        self.seed = seed
        self._check_lengths()
        self.shapes = self._choose_shapes()

    def _check_lengths(self) -> None:
        schedules = [s for s in (self.embedding, self.generative) if s is not None]
        for dataset in (dataset for schedule in schedules for dataset in schedule.datasets):
            for stream, longest in dataset.manifest.longest.items():
                if longest > self.row_lengths[stream]:
                    raise PreparedDataError(
                        f"config.data.{stream}_row_length={self.row_lengths[stream]} is shorter "
                        f"than the longest {stream} of {dataset.folder} ({longest} tokens)"
                    )

    def _choose_shapes(self) -> list[dict[str, int]]:
        """Returns up to four sets of row counts, ending with the one that always fits.

        Every step uses the first that it fits, so that a run compiles at most four programs.
        """
        plans = [self.plan(step) for step in range(STEPS_LOOKED_AT)]
        usual = _most_rows(plans)
        of_datasets = [
            _most_rows([plan for plan in plans if plan.dataset is dataset])
            for dataset in dict.fromkeys(plan.dataset for plan in plans)
        ]
        # Two datasets with rows of their own leave one spare shape; more datasets share one.
        candidates: list[Mapping[str, float]] = []
        candidates += of_datasets if len(of_datasets) == 2 else [usual]
        for factor in (SPARE_SHAPE, float("inf")):
            candidates.append({stream: rows * factor for stream, rows in usual.items()})
        most = {
            "query": self.embedding.batch_size if self.embedding else 0,
            "passage": self.embedding.batch_size * self.group_size if self.embedding else 0,
            "chat": self.generative.batch_size if self.generative else 0,
        }
        shapes = []
        for candidate in candidates:
            shape = {s: self._round_up(min(rows, most[s])) for s, rows in candidate.items()}
            if shape not in shapes:
                shapes.append(shape)
        return shapes

    def _round_up(self, rows: float) -> int:
        return int(-(-rows // self.row_multiple)) * self.row_multiple

    def plan(self, step: int) -> Plan:
        """Returns what step `step` reads and how it lies in rows, without reading an example."""
        rows, dataset, draws, passages, chat_dataset, chat_draws = {}, None, [], [], None, []
        if self.embedding is not None:
            dataset, draws = self.embedding[step]
            passages = [self._choose_passages(dataset, draw) for draw in draws]
            lengths = [dataset.lengths[draw.example] for draw in draws]
            rows["query"] = self._plan_rows("query", [int(own[0]) for own in lengths])
            rows["passage"] = self._plan_rows(
                "passage",
                [
                    int(own[1 + number])
                    for own, numbers in zip(lengths, passages, strict=True)
                    for number in numbers
                ],
            )
        if self.generative is not None:
            chat_dataset, chat_draws = self.generative[step]
            chats = [int(chat_dataset.lengths[draw.example][0]) for draw in chat_draws]
            rows["chat"] = self._plan_rows("chat", chats)
        return Plan(dataset, draws, passages, chat_dataset, chat_draws, rows)

    def _choose_passages(self, dataset: PreparedDataset, draw: Draw) -> list[int]:
        num_positives = int(dataset.lengths.num_positives[draw.example])
        num_negatives = len(dataset.lengths[draw.example]) - 1 - num_positives
        return choose_passages(num_positives, num_negatives, self.group_size, self.seed, draw)

    def _plan_rows(self, stream: str, lengths: Sequence[int]) -> list[list[int]]:
        return plan_rows(lengths, self.row_lengths[stream])

    def __getitem__(self, step: int) -> Batch:
        """Returns the global batch of step `step`."""
        plan = self.plan(step)
        shape = self._shape_of(plan)
        embedding = chats = None
        if plan.dataset is not None:
            embedding = self._read_embedding(plan.dataset, plan, shape)
        if plan.chat_dataset is not None:
            examples = plan.chat_dataset.read([draw.example for draw in plan.chat_draws])
            chats = self._pack("chat", [example.chat for example in examples], plan, shape)
        return Batch(embedding, chats)

    def _shape_of(self, plan: Plan) -> dict[str, int]:
        for shape in self.shapes:
            if all(len(rows) <= shape[stream] for stream, rows in plan.rows.items()):
                return shape
        raise AssertionError("the last shape has a row for each text")

    def _read_embedding(
        self, dataset: PreparedDataset, plan: Plan, shape: dict[str, int]
    ) -> EmbeddingBatch:
        examples = dataset.read([draw.example for draw in plan.draws])
        passages, positives = [], []
        for example, numbers in zip(examples, plan.passages, strict=True):
            positives.append(len(passages))
            passages += [example.texts[1 + number] for number in numbers]
        # Groups that lack negatives leave the last numbers of the batch unused.
        passages += [None] * (len(examples) * self.group_size - len(passages))
        return EmbeddingBatch(
            queries=self._pack("query", [example.query for example in examples], plan, shape),
            passages=self._pack("passage", passages, plan, shape),
            positives=np.array(positives, np.int32),
            passage_contents=number_contents(passages),
        )

    def _pack(self, stream: str, texts: Sequence[Text | None], plan: Plan, shape: dict[str, int]):
        return pack(texts, plan.rows[stream], shape[stream], self.row_lengths[stream])


def _most_rows(plans: Sequence[Plan]) -> dict[str, int]:
    return {stream: max(len(plan.rows[stream]) for plan in plans) for stream in plans[0].rows}


def number_contents(texts: Sequence[Text | None]) -> np.ndarray:
    """Returns for each text the number of the first that is the same to the token; -1 for None."""
    first: dict[bytes, int] = {}
    return np.array(
        [
            -1 if text is None else first.setdefault(text.tokens.tobytes(), number)
            for number, text in enumerate(texts)
        ],
        np.int32,
    )


class _FromStep:
    """A Grain data source of the batches of steps `start` to `stop`."""

    def __init__(self, batches: Batches, start: int, stop: int):
        self._batches, self._start, self._stop = batches, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> Batch:
        return self._batches[self._start + index]


def read_ahead(batches: Batches, start: int, stop: int) -> Iterator[Batch]:
    """Yields the batches of steps `start` to `stop`, read and packed ahead of time by Grain."""
    source = grain.MapDataset.source(_FromStep(batches, start, stop))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(source.to_iter_dataset(options))
