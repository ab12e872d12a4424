"""The schedule: what a step reads depends on the seed and the step, and on nothing before it."""

from collections import Counter
import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from grit_jax.data.manifest import PreparedDataError
from grit_jax.data.schedule import Draw, Schedule, choose_passages, stable_seed


@dataclasses.dataclass(frozen=True)
class FakeDataset:
    """As much of a prepared dataset as a schedule sees."""

    name: str
    size: int

    @property
    def folder(self):
        return f"prepared/{self.name}/train"

    def __len__(self):
        return self.size


def order(size, batch_size, seed, epochs=1, name="texts"):
    """The examples that a schedule of one dataset draws, by epoch."""
    schedule = Schedule({FakeDataset(name, size): 1.0}, batch_size, seed)
    by_epoch = [[] for _ in range(epochs)]
    for step in range(-(-size * epochs // batch_size)):
        for draw in schedule[step][1]:
            if draw.epoch < epochs:
                by_epoch[draw.epoch].append(draw.example)
    return by_epoch


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_each_epoch_reads_every_example_once(data):
    size = data.draw(st.integers(1, 50), "size")
    batch_size = data.draw(st.integers(1, size), "batch size")
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    for examples in order(size, batch_size, seed, epochs=3):
        assert sorted(examples) == list(range(size))


def test_order_is_new_in_each_epoch_for_each_seed_and_for_each_dataset():
    first, second = order(50, 7, seed=1, epochs=2)
    (other_seed,) = order(50, 7, seed=2)
    (other_dataset,) = order(50, 7, seed=1, name="others")
    orders = [list(range(50)), first, second, other_seed, other_dataset]
    assert len({tuple(examples) for examples in orders}) == len(orders)
    assert order(50, 7, seed=1, epochs=2) == [first, second]


@settings(deadline=None, max_examples=15)
@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=4), start=st.integers(0, 10_000))
def test_datasets_take_turns_at_their_rates(weights, start):
    datasets = {FakeDataset(f"d{n}", 64): weight / 10 for n, weight in enumerate(weights)}
    schedule = Schedule(datasets, 2, seed=0)
    steps = 200
    turns = Counter(schedule[step][0].name for step in range(start, start + steps))
    for number, weight in enumerate(weights):
        expected = steps * weight / sum(weights)
        # Rates are kept to a hundredth of the smallest.
        assert abs(turns[f"d{number}"] - expected) <= 2 + 0.01 * expected


@pytest.mark.parametrize(("rates", "block"), [((0.8, 0.2), 5), ((0.75, 0.25), 4)])
def test_turns_are_spread_evenly_over_each_block(rates, block):
    datasets = {FakeDataset(f"d{n}", 64): rate for n, rate in enumerate(rates)}
    schedule = Schedule(datasets, 2, seed=0)
    for start in (0, block, 1000 * block):
        turns = Counter(schedule[step][0].name for step in range(start, start + block))
        assert turns == {"d0": block - 1, "d1": 1}


def test_a_dataset_goes_on_where_its_own_last_turn_stopped():
    schedule = Schedule({FakeDataset("a", 12): 0.75, FakeDataset("b", 8): 0.25}, 4, seed=3)
    drawn = {"a": [], "b": []}
    for step in range(8):
        dataset, draws = schedule[step]
        drawn[dataset.name] += [(draw.epoch, draw.example) for draw in draws]
    assert sorted(drawn["a"]) == [(epoch, n) for epoch in (0, 1) for n in range(12)]
    assert sorted(drawn["b"]) == [(0, n) for n in range(8)]


def test_a_step_does_not_depend_on_the_steps_asked_for_before():
    def make():
        return Schedule({FakeDataset("a", 30): 0.6, FakeDataset("b", 40): 0.4}, 8, seed=5)

    in_order, backwards = make(), make()
    steps = [*range(12), 999_999, 1_000_000]
    expected = {step: in_order[step] for step in steps}
    assert {step: backwards[step] for step in reversed(steps)} == expected
    assert make()[1_000_000] == expected[1_000_000]


def test_too_few_examples_for_a_batch_name_the_folder():
    datasets = {FakeDataset("enough", 64): 0.5, FakeDataset("small", 7): 0.5}
    with pytest.raises(PreparedDataError, match=r"prepared/small/train has 7 examples.*batch of 8"):
        Schedule(datasets, 8, seed=0)


counts = st.integers(1, 6)


@settings(deadline=None)
@given(num_positives=counts, num_negatives=st.integers(0, 9), group_size=counts, epoch=counts)
def test_a_group_is_one_positive_and_distinct_negatives(
    num_positives, num_negatives, group_size, epoch
):
    draw = Draw(example=11, epoch=epoch)
    passages = choose_passages(num_positives, num_negatives, group_size, 0, draw)
    positive, negatives = passages[0], passages[1:]
    assert 0 <= positive < num_positives
    assert len(negatives) == len(set(negatives)) == min(group_size - 1, num_negatives)
    assert all(num_positives <= n < num_positives + num_negatives for n in negatives)
    assert passages == choose_passages(num_positives, num_negatives, group_size, 0, draw)


def test_every_passage_gets_its_turn_and_groups_change_with_epoch_example_and_seed():
    groups = [choose_passages(3, 5, 3, 0, Draw(7, epoch)) for epoch in range(100)]
    assert {group[0] for group in groups} == {0, 1, 2}
    assert {number for group in groups for number in group[1:]} == {3, 4, 5, 6, 7}
    assert groups != [choose_passages(3, 5, 3, 0, Draw(8, epoch)) for epoch in range(100)]
    assert groups != [choose_passages(3, 5, 3, 1, Draw(7, epoch)) for epoch in range(100)]


def test_stable_seed_is_the_same_on_every_machine_and_depends_on_each_part():
    assert stable_seed(0, "order", "texts") == stable_seed(0, "order", "texts") == 3569645032
    parts = [(0, "a", "b"), (1, "a", "b"), (0, "b", "b"), (0, "a", "c"), (0, "a")]
    seeds = [stable_seed(*each) for each in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**32 for seed in seeds)
