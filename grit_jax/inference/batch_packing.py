"""Which texts go to the devices together: rows of a handful of lengths, in calls of few shapes."""

from collections.abc import Iterator, Sequence
import dataclasses

import numpy as np

from grit_jax.data.packing import plan_rows

# Rows are this long times a power of two. Short rows are for few texts alone: many are packed.
SHORTEST_ROW, SHORTEST_PACKED_ROW = 64, 256
# A text is given no fewer places, so that a call has a bounded number of texts.
PLACES_OF_A_TEXT = 8
# Places of a call on one device: enough to keep it busy, and little memory.
TOKENS_PER_DEVICE = 8192


@dataclasses.dataclass(frozen=True)
class PackedCall:
    """Rows that are read at once.

    Attributes:
      rows: for each row the numbers of its texts; there may be fewer than `num_rows`.
      num_rows: rows of the call's arrays.
      row_length: places of a row.
    """

    rows: list[list[int]]
    num_rows: int
    row_length: int

    @property
    def num_texts(self) -> int:
        """The most texts that a call of this shape has."""
        return self.num_rows * self.row_length // PLACES_OF_A_TEXT


def row_length_for(length: int) -> int:
    """Returns the length of the shortest row that holds so many tokens."""
    row_length = SHORTEST_ROW
    while row_length < length:
        row_length *= 2
    return row_length


def plan_calls(lengths: Sequence[int], num_shards: int, places: int) -> list[PackedCall]:
    """Returns which texts share a row, and which rows a call.

    A row is no longer than its longest text needs (or `SHORTEST_PACKED_ROW`), and filled with
    shorter texts. Calls of rows of one length have one of few numbers of rows.

    Args:
      lengths: tokens of each text, at least 1.
      num_shards: ways in which the rows of a call are split over devices.
      places: of a call on one device; one row may have more.
    """
    left = np.maximum(np.asarray(lengths, np.int64), PLACES_OF_A_TEXT)
    row_length = max(SHORTEST_PACKED_ROW, row_length_for(left.max()))
    calls = []
    while left.any():
        rows = plan_rows(left, row_length)
        if row_length > SHORTEST_PACKED_ROW:  # Each row begins with its longest text.
            rows = [row for row in rows if left[row[0]] > row_length // 2]
        calls += _calls(rows, left, row_length, num_shards, places)
        left[[text for row in rows for text in row]] = 0
        row_length //= 2
    return calls


def _calls(
    rows: list[list[int]], lengths: np.ndarray, row_length: int, num_shards: int, places: int
) -> Iterator[PackedCall]:
    counts = _numbers_of_rows(row_length, num_shards, places)
    start = 0
    while (left := len(rows) - start) > 0:
        # The largest number of rows of which at most a quarter stays empty.
        count = next((count for count in counts if left >= count * 0.75), counts[-1])
        taken = rows[start : start + count]
        start += count
        longest = max(int(lengths[row].sum()) for row in taken)
        length = row_length_for(longest) if len(taken) == 1 else row_length
        yield PackedCall(taken, count, length)


def _numbers_of_rows(row_length: int, num_shards: int, places: int) -> list[int]:
    """Returns the numbers of rows that a call may have, the largest first."""
    counts = [max(1, places // row_length) * num_shards]
    while counts[-1] > num_shards:
        counts.append(max(1, counts[-1] // (4 * num_shards)) * num_shards)
    return counts
