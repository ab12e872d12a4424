"""Packs several texts into each row: chooses which texts share a row, and builds the arrays."""

import bisect
from collections.abc import Iterator, Mapping, Sequence
import heapq

import numpy as np

from grit_jax.data.batch import PackedTexts
from grit_jax.text.examples import Text


def fit_rows(
    lengths: Sequence[int] | np.ndarray, num_rows: int, row_length: int
) -> list[list[int]] | None:
    """Assigns texts to at most `num_rows` rows; returns None if no assignment is found.

    Best fit is tried first: it needs the fewest rows if short texts fill the gaps that long texts
    leave. If it needs too many rows, texts are spread evenly, which suits texts of similar length.

    Args:
      lengths: tokens of each text; 0 for an unused index.
      num_rows: number of rows available.
      row_length: tokens per row.

    Returns:
      For each row the indices of its texts. The result depends on the arguments only.

    Raises:
      ValueError: a text is longer than a row.
    """
    rows = plan_rows(lengths, row_length)
    return rows if len(rows) <= num_rows else _spread(lengths, num_rows, row_length)


def plan_rows(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Assigns texts to as many rows as needed: best fit, longest text first.

    Arguments, result and errors are those of `fit_rows`.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # Free tokens and index of each row, sorted.
    for text, length in _longest_first(lengths):
        if length > row_length:
            raise ValueError(f"a text of {length} tokens does not fit a row of {row_length}")
        fullest_fit = bisect.bisect_left(free, (length, -1))
        if fullest_fit == len(free):
            rows.append([])
            left, row = row_length, len(rows) - 1
        else:
            left, row = free.pop(fullest_fit)
        rows[row].append(text)
        bisect.insort(free, (left - length, row))
    return rows


def _spread(
    lengths: Sequence[int] | np.ndarray, num_rows: int, row_length: int
) -> list[list[int]] | None:
    """Assigns each text, longest first, to the emptiest row; returns None if one does not fit."""
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
    """Yields the indices and lengths of the texts, without unused indices."""
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
    """Returns texts packed into rows.

    Args:
      texts: the texts by index.
      rows: for each row the indices of its texts.
      num_rows: number of rows to return; rows beyond `rows` are padding.
      row_length: tokens per row.
      num_texts: number of texts in the whole batch; by default the number of `texts`.
    """
    shape = (num_rows, row_length)
    tokens, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(3))
    mask = np.zeros(shape, bool)
    counting = np.arange(row_length, dtype=np.int32)
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            text = texts[index]
            span = slice(start, start + len(text))
            tokens[row, span] = text.tokens
            segment_ids[row, span] = index + 1
            positions[row, span] = counting[: len(text)]
            mask[row, span] = text.mask
            start += len(text)
    return PackedTexts(tokens, segment_ids, positions, mask, num_texts or len(texts))
