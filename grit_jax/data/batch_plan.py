"""The whole global batch of a step, planned from lengths alone, on every host alike."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools

from jaxtyping import Int, UInt64
import numpy as np

from grit_jax.data.manifest import PreparedDataError, PreparedDataset
from grit_jax.data.packing import fit_rows
from grit_jax.data.sampling import SampledExamples, Stream
from grit_jax.data.shapes import RowLimits, Shape, StepProfile, choose_row_shapes
from grit_jax.text.kinds import TEXT_KINDS


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """How the texts of one stream of rows ("query", "passage" or "chat") lie.

    Attributes:
      draws: for each text the number of its example among those that the step draws.
      texts: for each text its number among the texts of its dataset; -1 for an unused number.
      lengths: tokens of each text.
      rows: for each row the numbers of its texts.
    """

    draws: Int[np.ndarray, " texts"]
    texts: Int[np.ndarray, " texts"]
    lengths: Int[np.ndarray, " texts"]
    rows: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step reads and how it lies in rows.

    Attributes:
      drawn: the examples, "embedding" or "generative" or both.
      shape: the rows that the step has.
      streams: how texts lie in them.
    """

    drawn: dict[str, SampledExamples]
    shape: Shape
    streams: dict[str, StreamPlan]

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(int(stream.lengths.sum()) for stream in self.streams.values())


class Planner:
    """The plans of a run by step.

    Args:
      streams: where examples come from: "embedding" or "generative" or both.
      limits: what rows may be.

    Raises:
      PreparedDataError: a dataset has a text that is longer than a row may be.
    """

    def __init__(self, streams: dict[str, Stream], limits: RowLimits):
        self.streams, self.limits = streams, limits
        self.shapes = self._choose_shapes()

    def __getitem__(self, step: int) -> Plan:
        """Returns the plan of step `step`: the first shape that its texts fit."""
        drawn = {kind: stream[step] for kind, stream in self.streams.items()}
        texts = {
            stream: _texts_of(draws, columns)
            for kind, draws in drawn.items()
            for stream, columns in TEXT_KINDS[kind].streams.items()
        }
        for shape in self.shapes:
            rows = _fit(texts, shape)
            if rows is not None:
                streams = {name: StreamPlan(*texts[name], rows[name]) for name in shape}
                return Plan(drawn, shape, streams)
        raise AssertionError("the last shape has a row for each text")

    def empty(self, shape: Shape) -> Plan:
        """Returns a plan of a shape that holds no text."""
        drawn = {kind: _no_draws(stream) for kind, stream in self.streams.items()}
        streams = {
            stream: StreamPlan(*_texts_of(draws, columns), [])
            for kind, draws in drawn.items()
            for stream, columns in TEXT_KINDS[kind].streams.items()
        }
        return Plan(drawn, shape, streams)

    def _choose_shapes(self) -> list[Shape]:
        longest_texts, most_texts = {}, {}
        for kind, stream in self.streams.items():
            for name in TEXT_KINDS[kind].streams:
                longest_texts[name] = self._longest(stream, name)
                most_texts[name] = stream.batch_size * (
                    stream.group_size if name == "passage" else 1
                )
        return choose_row_shapes(self._kinds_of_steps(), longest_texts, most_texts, self.limits)

    def _longest(self, stream: Stream, name: str) -> int:
        for dataset in stream.datasets:
            check_row_length(dataset, name, dataset.manifest.longest[name], self.limits.longest)
        return max(dataset.manifest.longest[name] for dataset in stream.datasets)

    def _kinds_of_steps(self) -> list[StepProfile]:
        """Returns a kind for each choice of datasets that the streams make independently."""
        kinds = []
        previews = [
            [(kind, share, drawn) for share, drawn in stream.previews()]
            for kind, stream in self.streams.items()
        ]
        for chosen in itertools.product(*previews):
            seen = {
                name: [_texts_of(draws, columns)[2] for draws in drawn]
                for kind, _, drawn in chosen
                for name, columns in TEXT_KINDS[kind].streams.items()
            }
            share = float(np.prod([share for _, share, _ in chosen]))
            kinds.append(StepProfile(share, seen))
        return kinds


def check_row_length(
    dataset: PreparedDataset, name: str, longest: int, row_lengths: Mapping[str, int]
) -> None:
    """Checks that rows have room for the longest text of a dataset.

    Raises:
      PreparedDataError: they have not; the message names the field.
    """
    if longest > row_lengths[name]:
        raise PreparedDataError(
            f"config.data.{name}_row_length={row_lengths[name]} is shorter than the longest {name} "
            f"of {dataset.folder} ({longest} tokens)"
        )


def _fit(
    texts: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], shape: Shape
) -> dict[str, list[list[int]]] | None:
    """Returns how the texts of all streams lie in the rows of a shape; None if they do not fit."""
    if any(texts[name][2].sum() > rows.places for name, rows in shape.items()):
        return None  # Most shapes that are too small are found out so, at no cost.
    planned = {}
    for name, rows in shape.items():
        fitting = fit_rows(texts[name][2], rows.count, rows.length)
        if fitting is None:
            return None
        planned[name] = fitting
    return planned


def _no_draws(stream: Stream) -> SampledExamples:
    """Returns draws as many as a batch has, without any text."""
    examples = np.zeros(stream.batch_size, np.int64)
    texts = np.full((stream.batch_size, 1 + stream.group_size), -1, np.int64)
    return SampledExamples(examples, examples, examples, texts, np.zeros_like(texts, np.int32))


def _texts_of(draws: SampledExamples, columns: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns of each text its example, its number in the dataset, and its length."""
    texts = draws.texts[:, columns]
    examples = np.repeat(np.arange(len(draws)), texts.shape[1])
    return examples, texts.ravel(), draws.lengths[:, columns].ravel()


def deduplicated_ids(
    fingerprints: UInt64[np.ndarray, " P"], used: Sequence[bool] | np.ndarray | None = None
) -> Int[np.ndarray, " P"]:
    """Returns for each text the number of the first that is the same; -1 where none is used."""
    places = np.arange(len(fingerprints)) if used is None else np.flatnonzero(used)
    _, first, alike = np.unique(fingerprints[places], return_index=True, return_inverse=True)
    contents = np.full(len(fingerprints), -1, np.int32)
    contents[places] = places[first[alike]]
    return contents
