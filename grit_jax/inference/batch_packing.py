"""Packs texts into few rows, and rows into calls of few shapes, so that few programs compile."""

from collections.abc import Iterator, Sequence
import dataclasses

import numpy as np

from grit_jax.data.packing import plan_rows

# Row lengths are these times a power of two; short rows are only for a few texts.
SHORTEST_ROW, SHORTEST_PACKED_ROW = 64, 256
# A text counts as at least this many tokens, which bounds the number of texts in a call.
MIN_TOKENS_PER_TEXT = 8
# Maximum tokens of a call on one device, padding included: it keeps a device busy with little
# memory.
TOKENS_PER_DEVICE = 8192


@dataclasses.dataclass(frozen=True)
class PackedCall:
    """Texts that are packed into the rows of one call.

    Attributes:
      rows: the indices of the texts in each row; there may be fewer rows than `num_rows`.
      num_rows: number of rows of the call's arrays.
      row_length: number of tokens in a row.
    """

    rows: list[list[int]]
    num_rows: int
    row_length: int

    @property
    def max_texts(self) -> int:
        """Maximum number of texts in a call of this shape."""
        return self.num_rows * self.row_length // MIN_TOKENS_PER_TEXT


def row_length_for(length: int) -> int:
    """Returns the length of the shortest row that holds `length` tokens."""
    row_length = SHORTEST_ROW
    while row_length < length:
        row_length *= 2
    return row_length


def plan_calls(lengths: Sequence[int], num_shards: int, tokens_per_device: int) -> list[PackedCall]:
    """Assigns texts to rows, and rows to calls.

    A row is no longer than its longest text needs (or `SHORTEST_PACKED_ROW`), and is filled with
    shorter texts. For each row length, a call has one of a few numbers of rows.

    Args:
      lengths: number of tokens of each text, at least 1.
      num_shards: number of parts into which the devices split the rows of a call.
      tokens_per_device: maximum tokens of a call on one device; a single row may have more.
    """
    remaining = np.maximum(np.asarray(lengths, np.int64), MIN_TOKENS_PER_TEXT)
    row_length = max(SHORTEST_PACKED_ROW, row_length_for(int(remaining.max())))
    calls = []
    while remaining.any():
        rows = plan_rows(remaining, row_length)
        if row_length > SHORTEST_PACKED_ROW:  # The first text of a row is its longest.
            rows = [row for row in rows if remaining[row[0]] > row_length // 2]
        calls += _calls(rows, remaining, row_length, num_shards, tokens_per_device)
        remaining[[text for row in rows for text in row]] = 0
        row_length //= 2
    return calls


def call_shapes(
    num_texts: int, max_length: int, num_shards: int, tokens_per_device: int
) -> list[tuple[int, int]]:
    """Returns the number and the length of rows of all calls that `plan_calls` may make.

    Args:
      num_texts: maximum number of texts.
      max_length: maximum tokens of a text.
      num_shards: see `plan_calls`.
      tokens_per_device: see `plan_calls`.
    """
    shapes, row_length, longest = [], SHORTEST_ROW, row_length_for(max_length)
    if num_texts > 1:
        longest = max(SHORTEST_PACKED_ROW, longest)
    while row_length <= longest:
        counts = [num_shards]
        if row_length >= SHORTEST_PACKED_ROW:
            counts = _row_counts(row_length, num_shards, tokens_per_device)
        smallest = counts[-1]
        shapes += [
            (count, row_length) for count in counts if count == smallest or _fits(num_texts, count)
        ]
        row_length *= 2
    return shapes


def _calls(
    rows: list[list[int]],
    lengths: np.ndarray,
    row_length: int,
    num_shards: int,
    tokens_per_device: int,
) -> Iterator[PackedCall]:
    counts = _row_counts(row_length, num_shards, tokens_per_device)
    start = 0
    while (remaining := len(rows) - start) > 0:
        count = next((count for count in counts if _fits(remaining, count)), counts[-1])
        taken = rows[start : start + count]
        start += count
        longest = max(int(lengths[row].sum()) for row in taken)
        length = row_length_for(longest) if len(taken) == 1 else row_length
        yield PackedCall(taken, count, length)


def _fits(remaining: int, count: int) -> bool:
    """Returns whether at most a quarter of `count` rows would be empty."""
    return remaining >= count * 0.75


def _row_counts(row_length: int, num_shards: int, tokens_per_device: int) -> list[int]:
    """Returns the numbers of rows that a call may have, in descending order.

    A lower maximum of tokens removes the larger numbers, but does not add others.
    """
    count, counts = max(1, TOKENS_PER_DEVICE // row_length), []
    while count > 1:
        counts.append(count)
        count //= 4
    largest = tokens_per_device // row_length
    return [count * num_shards for count in [*counts, 1] if count <= max(1, largest)]
