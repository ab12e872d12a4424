"""Several texts to a row: which go together, and the arrays that come of it."""

import bisect
from collections.abc import Iterator, Mapping, Sequence
import heapq

import numpy as np

from grit_jax.data.batch import PackedTexts
from grit_jax.text.examples import Text


def fit_rows(
    lengths: Sequence[int] | np.ndarray, num_rows: int, row_length: int
) -> list[list[int]] | None:
    """Returns which texts share a row, at most `num_rows` rows; None if no way is found.

    Best fit leaves the fewest rows where short texts fill the gaps that long ones leave. Where all
    texts are about as long, an even spread needs shorter rows.

    Args:
      lengths: tokens of each text; 0 where a number is left unused.
      num_rows: number of rows there are.
      row_length: tokens that fit into a row.

    Returns:
      For each row the numbers of its texts. The same lengths give the same rows everywhere.

    Raises:
      ValueError: a text is longer than a row.
    """
    rows = plan_rows(lengths, row_length)
    return rows if len(rows) <= num_rows else _spread(lengths, num_rows, row_length)


def plan_rows(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Returns which texts share a row, in as many rows as it takes: best fit, longest first.

    The arguments, the result and the errors are those of `fit_rows`.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # Of each row what is left and its number, sorted.
    for text, length in _longest_first(lengths):
        if length > row_length:
            raise ValueError(f"a text of {length} tokens does not fit a row of {row_length}")
        place = bisect.bisect_left(free, (length, -1))
        if place == len(free):
            rows.append([])
            left, row = row_length, len(rows) - 1
        else:
            left, row = free.pop(place)
        rows[row].append(text)
        bisect.insort(free, (left - length, row))
    return rows


def _spread(
    lengths: Sequence[int] | np.ndarray, num_rows: int, row_length: int
) -> list[list[int]] | None:
    """Returns rows of which each text, longest first, goes to the emptiest; None if one is full."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    filled = [(0, row) for row in range(num_rows)]
    for text, length in _longest_first(lengths):
        tokens, row = filled[0]
        if tokens + length > row_length:
            return None
        rows[row].append(text)
        heapq.heapreplace(filled, (tokens + length, row))
    return rows


def _longest_first(lengths: Sequence[int] | np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields numbers and lengths of texts, without those that are unused."""
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
    return zip(order.tolist(), lengths[order].tolist(), strict=True)


def pack(
    texts: Mapping[int, Text] | Sequence[Text],
    rows: Sequence[Sequence[int]],
    num_rows: int,
    row_length: int,
    num_texts: int | None = None,
) -> PackedTexts:
    """Returns texts laid into rows.

    Args:
      texts: the texts by number.
      rows: for each row the numbers of its texts.
      num_rows: number of rows to return; those beyond `rows` are padding.
      row_length: tokens of a row.
      num_texts: number of texts in the whole batch, by default those given.
    """
    shape = (num_rows, row_length)
    tokens, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(3))
    mask = np.zeros(shape, bool)
    counting = np.arange(row_length, dtype=np.int32)
    for row, members in enumerate(rows):
        start = 0
        for number in members:
            text = texts[number]
            place = slice(start, start + len(text))
            tokens[row, place] = text.tokens
            segment_ids[row, place] = number + 1
            positions[row, place] = counting[: len(text)]
            mask[row, place] = text.mask
            start += len(text)
    return PackedTexts(tokens, segment_ids, positions, mask, num_texts or len(texts))
