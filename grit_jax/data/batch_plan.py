"""Plans the whole global batch of a step from lengths alone, identically on every host."""

from collections.abc import Mapping
import dataclasses
import itertools

from jaxtyping import Int
import numpy as np

from grit_jax.data.kinds import SampledExamples
from grit_jax.data.manifest import PreparedDataError, PreparedDataset
from grit_jax.data.packing import fit_rows
from grit_jax.data.sampling import Sampler
from grit_jax.data.shapes import RowLimits, Shape, StepProfile, choose_row_shapes
from grit_jax.text.kinds import TEXT_KINDS


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """How the texts of one stream are packed.

    Attributes:
      examples: index of each text's example among the examples that the step samples.
      texts: index of each text among the texts of its dataset; -1 for an unused index.
      lengths: tokens of each text.
      rows: for each row the indices of its texts.
    """

    examples: Int[np.ndarray, " texts"]
    texts: Int[np.ndarray, " texts"]
    lengths: Int[np.ndarray, " texts"]
    rows: list[list[int]]


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The examples of a step, and how they are packed.

    Attributes:
      sampled: the sampled examples of each kind of text.
      shape: the rows of the step.
      streams: how the texts of each stream are packed.
    """

    sampled: dict[str, SampledExamples]
    shape: Shape
    streams: dict[str, StreamPlan]

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(int(stream.lengths.sum()) for stream in self.streams.values())


class BatchPlanner:
    """The batch plans of a run, by step.

    Args:
      samplers: the sampler of each kind of text that is trained.
      limits: limits of the rows.

    Raises:
      PreparedDataError: a dataset has a text that is longer than the maximum row length.
    """

    def __init__(self, samplers: Mapping[str, Sampler], limits: RowLimits):
        self.samplers, self.limits = samplers, limits
        self.shapes = self._choose_shapes()

    def __getitem__(self, step: int) -> BatchPlan:
        """Returns the plan of step `step`, in the first shape that fits its texts."""
        sampled = {kind: sampler[step] for kind, sampler in self.samplers.items()}
        streams = _unpacked_streams(sampled)
        for shape in self.shapes:
            rows = _fit(streams, shape)
            if rows is not None:
                packed = {
                    name: dataclasses.replace(stream, rows=rows[name])
                    for name, stream in streams.items()
                }
                return BatchPlan(sampled, shape, packed)
        raise AssertionError("the last shape has a row for each text")

    def empty(self, shape: Shape) -> BatchPlan:
        """Returns a plan without texts for a shape."""
        sampled = {kind: _no_examples(sampler) for kind, sampler in self.samplers.items()}
        return BatchPlan(sampled, shape, _unpacked_streams(sampled))

    def _choose_shapes(self) -> list[Shape]:
        longest_texts, num_texts = {}, {}
        for kind, sampler in self.samplers.items():
            for name, texts in TEXT_KINDS[kind].streams.items():
                longest_texts[name] = self._longest(sampler, name)
                per_example = len(range(sampler.texts_per_example)[texts])
                num_texts[name] = sampler.batch_size * per_example
        return choose_row_shapes(self._step_profiles(), longest_texts, num_texts, self.limits)

    def _longest(self, sampler: Sampler, name: str) -> int:
        for dataset in sampler.datasets:
            check_row_length(dataset, name, dataset.manifest.longest[name], self.limits.longest)
        return max(dataset.manifest.longest[name] for dataset in sampler.datasets)

    def _step_profiles(self) -> list[StepProfile]:
        """Returns a profile for each combination of the samplers' profiles."""
        profiles = []
        previews = [
            [(kind, share, batches) for share, batches in sampler.previews()]
            for kind, sampler in self.samplers.items()
        ]
        for chosen in itertools.product(*previews):
            lengths = {
                name: [_stream_of(sampled, texts).lengths for sampled in batches]
                for kind, _, batches in chosen
                for name, texts in TEXT_KINDS[kind].streams.items()
            }
            share = float(np.prod([share for _, share, _ in chosen]))
            profiles.append(StepProfile(share, lengths))
        return profiles


def check_row_length(
    dataset: PreparedDataset, name: str, longest: int, row_lengths: Mapping[str, int]
) -> None:
    """Checks that the longest text of a dataset fits a row.

    Args:
      dataset: the dataset.
      name: name of the stream that the text belongs to.
      longest: tokens of the text.
      row_lengths: maximum tokens of a row of each stream.

    Raises:
      PreparedDataError: the text does not fit; the message names the configuration field.
    """
    if longest > row_lengths[name]:
        raise PreparedDataError(
            f"config.data.{name}_row_length={row_lengths[name]} is shorter than the longest {name} "
            f"of {dataset.folder} ({longest} tokens)"
        )


def _fit(streams: Mapping[str, StreamPlan], shape: Shape) -> dict[str, list[list[int]]] | None:
    """Returns the rows of all streams in a shape, or None if the texts do not fit."""
    if any(streams[name].lengths.sum() > rows.capacity for name, rows in shape.items()):
        return None  # A cheap test that rules out most shapes that are too small.
    packed = {}
    for name, rows in shape.items():
        fitting = fit_rows(streams[name].lengths, rows.count, rows.length)
        if fitting is None:
            return None
        packed[name] = fitting
    return packed


def _no_examples(sampler: Sampler) -> SampledExamples:
    """Returns as many examples as a batch has, without any text."""
    examples = np.zeros(sampler.batch_size, np.int64)
    texts = np.full((sampler.batch_size, sampler.texts_per_example), -1, np.int64)
    return SampledExamples(examples, examples, examples, texts, np.zeros_like(texts, np.int32))


def _unpacked_streams(sampled: Mapping[str, SampledExamples]) -> dict[str, StreamPlan]:
    """Returns the texts of all streams, not yet in rows."""
    return {
        name: _stream_of(examples, texts)
        for kind, examples in sampled.items()
        for name, texts in TEXT_KINDS[kind].streams.items()
    }


def _stream_of(sampled: SampledExamples, columns: slice) -> StreamPlan:
    """Returns the texts of one stream, not yet in rows: these columns of the sampled texts."""
    texts = sampled.texts[:, columns]
    examples = np.repeat(np.arange(len(sampled)), texts.shape[1])
    return StreamPlan(examples, texts.ravel(), sampled.lengths[:, columns].ravel(), [])
