"""Packing: every text is in one row, and can be extracted unchanged."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from grit_jax.data.packing import fit_rows, pack, plan_rows
from grit_jax.text.examples import Text

ROW_LENGTH = 32
lengths_of_texts = st.lists(st.integers(0, ROW_LENGTH), max_size=60)


def make_texts(lengths, seed=0):
    """Texts of random tokens without 0, the token of padding."""
    random = np.random.default_rng(seed)
    return {
        number: Text(random.integers(1, 1000, length).astype(np.int32), random.random(length) < 0.5)
        for number, length in enumerate(lengths)
        if length
    }


def used(lengths):
    return [number for number, length in enumerate(lengths) if length]


@settings(deadline=None)
@given(lengths=lengths_of_texts)
def test_every_text_is_in_one_row_and_no_row_is_too_full(lengths):
    rows = plan_rows(lengths, ROW_LENGTH)
    assert sorted(text for row in rows for text in row) == used(lengths)
    assert all(0 < sum(lengths[text] for text in row) <= ROW_LENGTH for row in rows)


@settings(deadline=None)
@given(lengths=lengths_of_texts)
def test_rows_are_few_and_the_same_for_the_same_lengths(lengths):
    rows = plan_rows(lengths, ROW_LENGTH)
    # Any two rows together exceed one row: otherwise best fit would have merged them.
    assert len(rows) <= 2 * sum(lengths) / ROW_LENGTH + 1
    assert rows == plan_rows(np.array(lengths, np.int64), ROW_LENGTH)


@settings(deadline=None)
@given(lengths=lengths_of_texts, num_rows=st.integers(1, 40))
def test_what_fits_is_whole_and_within_the_rows_there_are(lengths, num_rows):
    rows = fit_rows(lengths, num_rows, ROW_LENGTH)
    if rows is None:
        assert len(plan_rows(lengths, ROW_LENGTH)) > num_rows
        return
    assert len(rows) <= num_rows
    assert sorted(text for row in rows for text in row) == used(lengths)
    assert all(sum(lengths[text] for text in row) <= ROW_LENGTH for row in rows)


def test_a_text_goes_where_it_leaves_the_least():
    # Longest first: 7 leaves 3 and 6 leaves 4; 3 fits exactly after 7, and 2 only after 6.
    assert plan_rows([2, 3, 6, 7], 10) == [[3, 1], [2, 0]]


def test_texts_of_about_one_length_are_spread():
    # Longest first into the fullest row takes 5+5, 5+4, 4: three rows.
    lengths = [5, 5, 4, 4, 3, 3]
    assert len(plan_rows(lengths, 12)) == 3
    rows = fit_rows(lengths, 2, 12)
    assert sorted(sum(lengths[text] for text in row) for row in rows) == [12, 12]


@pytest.mark.parametrize("plan", [plan_rows, lambda lengths, row: fit_rows(lengths, 9, row)])
def test_a_text_longer_than_a_row_is_an_error(plan):
    with pytest.raises(ValueError, match="33 tokens does not fit a row of 32"):
        plan([5, ROW_LENGTH + 1], ROW_LENGTH)


@settings(deadline=None)
@given(lengths=lengths_of_texts, spare_rows=st.integers(0, 3))
def test_texts_come_out_of_their_rows_as_they_went_in(lengths, spare_rows):
    texts = make_texts(lengths)
    rows = plan_rows(lengths, ROW_LENGTH)
    packed = pack(texts, rows, len(rows) + spare_rows, ROW_LENGTH, num_texts=len(lengths))

    assert packed.num_texts == len(lengths)
    assert packed.tokens.shape == (len(rows) + spare_rows, ROW_LENGTH)
    for number, text in texts.items():
        is_own = packed.segment_ids == number + 1
        assert len(np.unique(np.nonzero(is_own)[0])) == 1
        np.testing.assert_array_equal(packed.tokens[is_own], text.tokens)
        np.testing.assert_array_equal(packed.mask[is_own], text.mask)
        np.testing.assert_array_equal(packed.positions[is_own], np.arange(len(text)))

    padding = packed.segment_ids == 0
    assert padding.sum() == packed.tokens.size - sum(lengths)
    assert not packed.tokens[padding].any()
    assert not packed.positions[padding].any()
    assert not packed.mask[padding].any()
    assert padding[len(rows) :].all()


def test_an_unused_index_does_not_shift_the_indices_after_it():
    texts = make_texts([2, 0, 3])
    packed = pack(texts, [[2, 0]], 1, 6, num_texts=3)
    np.testing.assert_array_equal(packed.segment_ids, [[3, 3, 3, 1, 1, 0]])
    assert packed.num_texts == 3
