"""Several texts to a row: which go together, and the arrays that come of it."""

import bisect
from collections.abc import Sequence

import numpy as np

from grit_jax.data.batch import PackedTexts
from grit_jax.data.examples import Text


def plan_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Returns which texts share a row: best fit, longest first.

    Args:
      lengths: tokens of each text.
      row_length: tokens that fit into a row.

    Returns:
      For each row the numbers of its texts. The same lengths give the same rows everywhere.

    Raises:
      ValueError: a text is longer than a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # Of each row what is left and its number, sorted.
    for text in sorted(range(len(lengths)), key=lambda text: (-lengths[text], text)):
        length = lengths[text]
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


def pack(
    texts: Sequence[Text | None], rows: Sequence[Sequence[int]], num_rows: int, row_length: int
) -> PackedTexts:
    """Returns the texts laid into rows.

    Args:
      texts: the texts by number; None where a number is left unused.
      rows: for each row the numbers of its texts.
      num_rows: number of rows to return; those beyond `rows` are padding.
      row_length: tokens of a row.
    """
    shape = (num_rows, row_length)
    tokens, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(3))
    mask = np.zeros(shape, bool)
    for row, members in enumerate(rows):
        start = 0
        for number in members:
            text = texts[number]
            assert text is not None, "an unused number has no row"
            place = slice(start, start + len(text))
            tokens[row, place] = text.tokens
            segment_ids[row, place] = number + 1
            positions[row, place] = np.arange(len(text))
            mask[row, place] = text.mask
            start += len(text)
    return PackedTexts(tokens, segment_ids, positions, mask, num_texts=len(texts))
