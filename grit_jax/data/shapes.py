"""The few shapes that the rows of a run have, chosen from the lengths of its texts.

A shape is a program to compile, and every place in it that holds no token is computed for nothing.
So there are at most four: two for what steps usually hold, a spare one that is a little larger than
all that was seen, and one that any step fits.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools

import numpy as np

from grit_jax.arithmetic import ceil_div
from grit_jax.data.packing import fit_rows

# How many more tokens the spare shape has room for than were seen.
HEADROOM = 1.05
# The part of a row that may be filled when shapes are chosen: steps vary a little.
ROOM_USED = 0.995
# The part of the steps that a shape is made for; the fullest few may take the spare one.
SHARE_SERVED = 0.95
# In a layer of Mistral 7B, attention over rows of this many tokens costs as much as the matrices.
ATTENTION_LENGTH = 26_000
# Most kinds of step that are told apart.
MOST_KINDS = 48


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one length: their number, and the tokens that fit into each."""

    count: int
    length: int

    @property
    def places(self) -> int:
        """Tokens that fit into all of them."""
        return self.count * self.length

    @property
    def cost(self) -> float:
        """What computing them costs, in places of short rows."""
        return self.places * (1 + self.length / ATTENTION_LENGTH)


# Tokens of each text of a step.
Lengths = Sequence[int] | np.ndarray
# The rows of "query", "passage" and "chat", or of those that are trained.
Shape = dict[str, Rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowLimits:
    """What rows may be.

    Attributes:
      longest: tokens of a row at most, by stream.
      length_multiple: row lengths are multiples of this where `longest` has room for one.
      count_multiple: row counts are multiples of this (the number of data shards).
    """

    longest: Mapping[str, int]
    length_multiple: int
    count_multiple: int

    def lengths(self, stream: str, longest_text: int) -> list[int]:
        """Returns the row lengths that a stream may have, shortest first."""
        step, most = self.length_multiple, self.longest[stream]
        return list(range(ceil_div(longest_text, step) * step, most + 1, step)) or [most]

    def round_up(self, count: int) -> int:
        """Returns the smallest number of rows that the data shards divide and is not below."""
        return ceil_div(max(1, count), self.count_multiple) * self.count_multiple


@dataclasses.dataclass(frozen=True)
class StepProfile:
    """What steps are like that read from the same datasets.

    Attributes:
      share: of the steps.
      seen: lengths of the texts of some such steps, by stream.
    """

    share: float
    seen: Mapping[str, Sequence[Lengths]]

    @property
    def max_tokens(self) -> dict[str, int]:
        """The most tokens that a step has in each stream."""
        return {stream: max(map(sum, seen)) for stream, seen in self.seen.items()}


def choose_row_shapes(
    kinds: Sequence[StepProfile],
    longest_texts: Mapping[str, int],
    most_texts: Mapping[str, int],
    limits: RowLimits,
) -> list[Shape]:
    """Returns up to four shapes, smallest first; every step fits the last.

    Args:
      kinds: what steps are like.
      longest_texts: tokens of the longest text of each stream.
      most_texts: number of texts of a step in each stream.
      limits: what rows may be.
    """
    groups = _cut(_merge_alike(kinds))
    lengths = {stream: limits.lengths(stream, longest) for stream, longest in longest_texts.items()}
    shapes = [
        {
            stream: best_rows(
                [texts for kind in group for texts in kind.seen[stream]], lengths[stream], limits
            )
            for stream in longest_texts
        }
        for group in groups
    ]
    largest = _elementwise_most([kind.max_tokens for kind in kinds])
    spare, any_step = {}, {}
    for stream, tokens in largest.items():
        length = max(shape[stream].length for shape in shapes)
        places = HEADROOM * max(tokens, *(shape[stream].places for shape in shapes))
        most = limits.round_up(most_texts[stream])
        spare[stream] = Rows(min(most, limits.round_up(-int(-places // length))), length)
        any_step[stream] = Rows(most, length)
    unique = []
    for shape in [*shapes, spare, any_step]:
        if shape not in unique:
            unique.append(shape)
    return unique


def best_rows(seen: Sequence[Lengths], lengths: Sequence[int], limits: RowLimits) -> Rows:
    """Returns the rows with the fewest places that all of the steps seen fit.

    Args:
      seen: lengths of the texts of each step.
      lengths: the row lengths to choose from.
      limits: what rows may be.
    """
    by_size = sorted(seen, key=sum, reverse=True)[int(len(seen) * (1 - SHARE_SERVED)) :]
    most = int(sum(by_size[0]))
    for rows in sorted(_candidates(most, lengths, limits), key=lambda rows: rows.cost):
        # The largest first: rows that are too few show at once.
        if all(_fit_with_room(texts, rows) for texts in by_size):
            return rows
    return Rows(limits.round_up(max(map(len, seen))), lengths[-1])


def _fit_with_room(texts: Lengths, rows: Rows) -> bool:
    filled = max(int(rows.length * ROOM_USED), max(texts))
    return filled <= rows.length and fit_rows(texts, rows.count, filled) is not None


def _candidates(tokens: int, lengths: Sequence[int], limits: RowLimits) -> Iterator[Rows]:
    """Yields rows that have places for this many tokens, and no more than twice as many."""
    for length in lengths:
        count = limits.round_up(ceil_div(tokens, length))
        while count * length <= max(2 * tokens, limits.count_multiple * length):
            yield Rows(count, length)
            count += limits.count_multiple


def _merge_alike(kinds: Sequence[StepProfile]) -> list[StepProfile]:
    """Returns at most `MOST_KINDS` kinds, smallest first; neighbours are joined for that."""
    by_size = sorted(kinds, key=lambda kind: sum(kind.max_tokens.values()))
    joined = []
    for places in np.array_split(np.arange(len(by_size)), min(MOST_KINDS, len(by_size))):
        members = [by_size[place] for place in places]
        streams = members[0].seen
        joined.append(
            StepProfile(
                sum(kind.share for kind in members),
                {stream: [s for kind in members for s in kind.seen[stream]] for stream in streams},
            )
        )
    return joined


def _cut(kinds: Sequence[StepProfile]) -> list[Sequence[StepProfile]]:
    """Returns the kinds in one or two groups that waste least; a third is left to the spare shape.

    Args:
      kinds: smallest first.
    """
    tokens = [kind.max_tokens for kind in kinds]
    largest = sum(_elementwise_most(tokens).values()) * HEADROOM

    def cost(first: int, last: int) -> float:
        places = sum(_elementwise_most(tokens[first:last]).values())
        return places * sum(kind.share for kind in kinds[first:last])

    def total(ends: tuple[int, ...]) -> float:
        groups = sum(cost(first, last) for first, last in itertools.pairwise((0, *ends)))
        return groups + largest * sum(kind.share for kind in kinds[ends[-1] :])

    numbers = range(1, len(kinds) + 1)
    ends = min([*((end,) for end in numbers), *itertools.combinations(numbers, 2)], key=total)
    return [kinds[first:last] for first, last in itertools.pairwise((0, *ends))]


def _elementwise_most(of_streams: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {stream: max(each[stream] for each in of_streams) for stream in of_streams[0]}
