"""Mixing and shuffling: the example of an index depends on the rates and the seed only."""

from collections import Counter
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from grit_jax.data.mixing import (
    MAX_BLOCK_LENGTH,
    EpochShuffle,
    MixtureSchedule,
    block_counts,
    stable_seed,
)

rates = st.lists(st.integers(1, 60), min_size=1, max_size=6)


def as_decimals(weights):
    return [weight / 100 for weight in weights]


@settings(deadline=None)
@given(weights=rates, block=st.integers(0, 2**40))
def test_every_block_holds_each_dataset_exactly_as_often_as_its_rate_says(weights, block):
    schedule = MixtureSchedule(as_decimals(weights))
    datasets, _ = schedule[np.arange(block * len(schedule), (block + 1) * len(schedule))]
    for dataset, weight in enumerate(weights):
        share = Fraction(Counter(datasets.tolist())[dataset], len(schedule))
        assert share == Fraction(weight, sum(weights))


@settings(deadline=None)
@given(weights=rates, start=st.integers(0, 500))
def test_slots_of_a_dataset_are_spread_evenly(weights, start):
    schedule = MixtureSchedule(as_decimals(weights))
    for length in (1, 7, 30):
        datasets, _ = schedule[np.arange(start, start + length)]
        for dataset, weight in enumerate(weights):
            expected = length * weight / sum(weights)
            assert abs(np.count_nonzero(datasets == dataset) - expected) <= len(weights)


@settings(deadline=None)
@given(weights=rates)
def test_a_dataset_continues_where_its_last_slot_stopped(weights):
    schedule = MixtureSchedule(as_decimals(weights))
    datasets, ranks = schedule[np.arange(3 * sum(weights))]
    assert len(schedule) <= sum(weights)
    for dataset in range(len(weights)):
        own = ranks[datasets == dataset]
        np.testing.assert_array_equal(own, np.arange(len(own)))


def test_a_slot_does_not_depend_on_the_other_slots_of_a_lookup():
    schedule = MixtureSchedule([0.6, 0.3, 0.1])
    slots = np.array([999_999_999, 3, 1_000_000])
    together = schedule[slots]
    for index, slot in enumerate(slots):
        dataset, rank = MixtureSchedule([0.6, 0.3, 0.1])[np.array([slot])]
        assert (dataset[0], rank[0]) == (together[0][index], together[1][index])


@pytest.mark.parametrize(
    ("given_rates", "counts"),
    [
        ([0.8, 0.2], [4, 1]),
        ([0.75, 0.25], [3, 1]),
        ([11600, 1778], [5800, 889]),
        ([1 / 3, 2 / 3], [1, 2]),
        ([1e-3, 1.0], [1, 1000]),
        ([5.0], [1]),
    ],
)
def test_blocks_are_the_shortest_that_keep_to_the_rates(given_rates, counts):
    assert block_counts(given_rates) == counts


def test_rates_that_no_block_keeps_to_are_kept_to_a_millionth():
    wanted = [np.pi, np.e, 1e-9]
    counts = block_counts(wanted)
    assert abs(sum(counts) - MAX_BLOCK_LENGTH) <= len(counts)
    assert counts[2] == 1
    assert counts[0] / counts[1] == pytest.approx(np.pi / np.e, abs=1e-5)


@pytest.mark.parametrize("rate", [0, -0.5, float("nan"), float("inf")])
def test_a_rate_that_is_not_positive_is_an_error(rate):
    with pytest.raises(ValueError, match=f"positive number, not {rate}"):
        MixtureSchedule([0.5, rate])


@settings(deadline=None)
@given(size=st.integers(1, 300), seed=st.text(max_size=5), epoch=st.integers(0, 2**30))
def test_each_epoch_has_every_example_once(size, seed, epoch):
    examples, epochs = EpochShuffle(size, seed)[np.arange(epoch * size, (epoch + 1) * size)]
    assert sorted(examples.tolist()) == list(range(size))
    assert set(epochs.tolist()) == {epoch}


def test_order_is_new_in_each_epoch_and_for_each_seed():
    first, second = np.split(EpochShuffle(50, "a")[np.arange(100)][0], 2)
    other, _ = EpochShuffle(50, "b")[np.arange(50)]
    orders = [np.arange(50), first, second, other]
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    np.testing.assert_array_equal(EpochShuffle(50, "a")[np.arange(50)][0], first)


def test_an_order_takes_no_memory_for_its_size():
    size = 2**32 - 1
    examples, epochs = EpochShuffle(size, "a")[np.array([0, size - 1, size, 10**6 * size])]
    assert all(0 <= example < size for example in examples)
    assert epochs.tolist() == [0, 0, 1, 10**6]
    with pytest.raises(ValueError, match="split the dataset"):
        EpochShuffle(2**32, "a")


def test_neighbours_come_apart():
    examples, _ = EpochShuffle(10_000, "a")[np.arange(10_000)]
    assert abs(np.corrcoef(examples[:-1], examples[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(examples, np.arange(10_000))[0, 1]) < 0.05


def test_stable_seed_is_the_same_on_every_machine_and_depends_on_each_part():
    assert stable_seed(0, "order", "texts") == stable_seed(0, "order", "texts") == 3569645032
    parts = [(0, "a", "b"), (1, "a", "b"), (0, "b", "b"), (0, "a", "c"), (0, "a")]
    seeds = [stable_seed(*each) for each in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**32 for seed in seeds)
