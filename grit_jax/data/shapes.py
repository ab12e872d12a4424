"""Chooses the few row shapes of a run from the lengths of its texts.

Each shape needs a compiled program, and padding wastes computation. So there are at most four
shapes: two for typical steps, a spare one slightly larger than every sampled step, and one that
fits any step.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools

import numpy as np

from grit_jax.arithmetic import ceil_div, round_up
from grit_jax.data.packing import fit_rows

# Capacity of the spare shape, relative to the largest sampled step.
HEADROOM = 1.05
# The part of a row that may be filled when shapes are chosen, because steps vary a little.
USABLE_FRACTION = 0.995
# The fraction of steps that a shape must fit; the fullest steps may use the spare shape.
FITTING_FRACTION = 0.95
# Row length for which attention costs as much as the matrix products in a layer of Mistral 7B.
ATTENTION_LENGTH = 26_000
# Maximum number of step profiles to choose shapes for.
MAX_PROFILES = 48


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of equal length.

    Attributes:
      count: number of rows.
      length: tokens per row.
    """

    count: int
    length: int

    @property
    def capacity(self) -> int:
        """Tokens that fit into all rows."""
        return self.count * self.length

    @property
    def cost(self) -> float:
        """Cost of computing the rows, in tokens of short rows."""
        return self.capacity * (1 + self.length / ATTENTION_LENGTH)


# Tokens of each text of a step.
TextLengths = Sequence[int] | np.ndarray
# The rows of each stream that is trained.
Shape = dict[str, Rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowLimits:
    """Limits of the rows.

    Attributes:
      longest: maximum tokens of a row, by stream.
      length_multiple: row lengths are multiples of this, if `longest` allows it.
      count_multiple: row counts are multiples of this (the number of data shards).
    """

    longest: Mapping[str, int]
    length_multiple: int
    count_multiple: int

    def lengths(self, stream: str, longest_text: int) -> list[int]:
        """Returns the allowed row lengths of a stream, shortest first."""
        step, maximum = self.length_multiple, self.longest[stream]
        return list(range(round_up(longest_text, step), maximum + 1, step)) or [maximum]

    def round_count(self, count: int) -> int:
        """Returns the smallest allowed row count that is at least `count`."""
        return round_up(max(1, count), self.count_multiple)


@dataclasses.dataclass(frozen=True)
class StepProfile:
    """Example steps that sample from the same datasets.

    Attributes:
      share: fraction of all steps with this profile.
      lengths: for each stream, the lengths of the texts of some steps.
    """

    share: float
    lengths: Mapping[str, Sequence[TextLengths]]

    @property
    def max_tokens(self) -> dict[str, int]:
        """Maximum number of tokens of a step in each stream."""
        return {stream: int(max(map(sum, steps))) for stream, steps in self.lengths.items()}


def choose_row_shapes(
    profiles: Sequence[StepProfile],
    longest_texts: Mapping[str, int],
    num_texts: Mapping[str, int],
    limits: RowLimits,
) -> list[Shape]:
    """Returns up to four shapes, smallest first; every step fits the last one.

    Args:
      profiles: the profiles of the run's steps.
      longest_texts: tokens of the longest text of each stream.
      num_texts: maximum number of texts of a step in each stream.
      limits: limits of the rows.
    """
    groups = _group(_merge_similar(profiles))
    row_lengths = {
        stream: limits.lengths(stream, longest) for stream, longest in longest_texts.items()
    }
    shapes = [
        {
            stream: best_rows(
                [texts for profile in group for texts in profile.lengths[stream]],
                row_lengths[stream],
                limits,
            )
            for stream in longest_texts
        }
        for group in groups
    ]
    largest = _elementwise_max([profile.max_tokens for profile in profiles])
    spare, any_step = {}, {}
    for stream, tokens in largest.items():
        length = max(shape[stream].length for shape in shapes)
        capacity = HEADROOM * max(tokens, *(shape[stream].capacity for shape in shapes))
        max_rows = limits.round_count(num_texts[stream])
        spare[stream] = Rows(min(max_rows, limits.round_count(-int(-capacity // length))), length)
        any_step[stream] = Rows(max_rows, length)
    unique = []
    for shape in [*shapes, spare, any_step]:
        if shape not in unique:
            unique.append(shape)
    return unique


def best_rows(steps: Sequence[TextLengths], row_lengths: Sequence[int], limits: RowLimits) -> Rows:
    """Returns the rows with the least padding that fit nearly all of the steps.

    Args:
      steps: lengths of the texts of each step.
      row_lengths: allowed row lengths.
      limits: limits of the rows.
    """
    largest_first = sorted(steps, key=sum, reverse=True)
    fitting = largest_first[int(len(steps) * (1 - FITTING_FRACTION)) :]
    tokens = int(sum(fitting[0]))
    candidates = _candidates(tokens, row_lengths, limits)
    for rows in sorted(candidates, key=lambda rows: rows.cost):
        # The largest step comes first, so rows that are too small are rejected at once.
        if all(_fits_with_room(texts, rows) for texts in fitting):
            return rows
    return Rows(limits.round_count(max(map(len, steps))), row_lengths[-1])


def _fits_with_room(texts: TextLengths, rows: Rows) -> bool:
    usable = max(int(rows.length * USABLE_FRACTION), int(max(texts)))
    return usable <= rows.length and fit_rows(texts, rows.count, usable) is not None


def _candidates(tokens: int, row_lengths: Sequence[int], limits: RowLimits) -> Iterator[Rows]:
    """Yields rows with a capacity of at least `tokens`, and at most twice as much."""
    for length in row_lengths:
        count = limits.round_count(ceil_div(tokens, length))
        while count * length <= max(2 * tokens, limits.count_multiple * length):
            yield Rows(count, length)
            count += limits.count_multiple


def _merge_similar(profiles: Sequence[StepProfile]) -> list[StepProfile]:
    """Merges profiles of similar size into at most `MAX_PROFILES`; returns them smallest first."""
    by_size = sorted(profiles, key=lambda profile: sum(profile.max_tokens.values()))
    merged = []
    for indices in np.array_split(np.arange(len(by_size)), min(MAX_PROFILES, len(by_size))):
        members = [by_size[index] for index in indices]
        merged.append(
            StepProfile(
                sum(member.share for member in members),
                {
                    stream: [step for member in members for step in member.lengths[stream]]
                    for stream in members[0].lengths
                },
            )
        )
    return merged


def _group(profiles: Sequence[StepProfile]) -> list[Sequence[StepProfile]]:
    """Splits profiles into one or two groups with the least padding.

    The largest profiles may be in no group; their steps use the spare shape.

    Args:
      profiles: the profiles, smallest first.
    """
    tokens = [profile.max_tokens for profile in profiles]
    largest = sum(_elementwise_max(tokens).values()) * HEADROOM

    def cost(first: int, last: int) -> float:
        capacity = sum(_elementwise_max(tokens[first:last]).values())
        return capacity * sum(profile.share for profile in profiles[first:last])

    def total(ends: tuple[int, ...]) -> float:
        groups = sum(cost(first, last) for first, last in itertools.pairwise((0, *ends)))
        return groups + largest * sum(profile.share for profile in profiles[ends[-1] :])

    counts = range(1, len(profiles) + 1)
    ends = min([*((end,) for end in counts), *itertools.combinations(counts, 2)], key=total)
    return [profiles[first:last] for first, last in itertools.pairwise((0, *ends))]


def _elementwise_max(by_stream: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {stream: max(each[stream] for each in by_stream) for stream in by_stream[0]}
