"""Length balancing: every batch keeps its slots, and has about as many tokens as the others."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from grit_jax.data.length_balancing import balance_batches


@settings(deadline=None)
@given(data=st.data())
def test_batches_keep_their_number_of_examples_of_each_group(data):
    count = data.draw(st.integers(1, 60), "examples")
    small = st.lists(st.integers(0, 4), min_size=count, max_size=count)
    batches, groups = (np.array(data.draw(small)) for _ in range(2))
    streams = data.draw(st.integers(1, 2), "streams")
    size = count * streams
    longs = st.lists(st.integers(0, 99), min_size=size, max_size=size)
    lengths = np.array(data.draw(longs)).reshape(count, streams)
    balanced = balance_batches(batches, groups, lengths)
    before = Counter(zip(batches.tolist(), groups.tolist(), strict=True))
    assert Counter(zip(balanced.tolist(), groups.tolist(), strict=True)) == before
    np.testing.assert_array_equal(balanced, balance_batches(batches, groups, lengths))


def totals(batches, lengths):
    return np.array([lengths[batches == batch].sum(axis=0) for batch in np.unique(batches)])


@pytest.mark.parametrize(("num_batches", "batch_size", "factor"), [(60, 8, 3), (8, 256, 20)])
def test_long_tailed_lengths_are_balanced_in_each_stream(num_batches, batch_size, factor):
    random = np.random.default_rng(0)
    count = num_batches * batch_size
    lengths = np.stack(
        [random.lognormal(3, 0.5, count), random.lognormal(6, 0.8, count).clip(0, 2048)], axis=1
    ).astype(int)
    batches = np.repeat(np.arange(num_batches), batch_size)
    groups = random.integers(0, 2, count)
    before, after = (
        totals(batches, lengths),
        totals(balance_batches(batches, groups, lengths), lengths),
    )
    spread_before = np.ptp(before, axis=0) / before.mean(axis=0)
    spread_after = np.ptp(after, axis=0) / after.mean(axis=0)
    assert (spread_after < spread_before / factor).all()


def test_a_group_of_some_batches_alone_gets_no_more_than_the_others():
    random = np.random.default_rng(0)
    batches, is_long = np.repeat(np.arange(1000), 8), np.arange(8000) % 8 < 2
    drawn = np.where(is_long, random.normal(78, 16, 8000), random.normal(45, 12, 8000))
    lengths = drawn.clip(1).astype(int)
    # The short examples of the first five batches are from another epoch than all others.
    groups = np.where(is_long, 0, np.where(batches < 5, 1, 2))
    after = totals(balance_batches(batches, groups, lengths[:, None]), lengths)
    assert abs(after[:5].mean() / after.mean() - 1) < 0.05


def test_a_batch_with_few_slots_gets_long_and_short_examples():
    # The last batch has half of the slots of the others, and should have half of the tokens.
    batches = np.array([0] * 40 + [1] * 40 + [2] * 20)
    lengths = np.arange(1, 101)[:, None]
    after = totals(balance_batches(batches, np.zeros(100, int), lengths), lengths)[:, 0]
    assert abs(after[2] - after[0] / 2) < 0.1 * after[0]
