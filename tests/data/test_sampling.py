"""Draws: what a step reads is a pure function of datasets, seed and step."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from prepared_data import chat_examples, embedding_examples, open_datasets, write_prepared
import pytest

from grit_jax.data import sampling as draws_module
from grit_jax.data.manifest import Lengths, PreparedDataError
from grit_jax.data.sampling import MixedSampler, SingleDatasetSampler, sample_passages

SIZES = {"a": 60, "b": 40, "chats": 50}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    random = np.random.default_rng(0)
    write_prepared(folder, "a", embedding_examples(random, SIZES["a"], 16))
    write_prepared(folder, "b", embedding_examples(random, SIZES["b"], 4))
    write_prepared(folder, "chats", chat_examples(random, SIZES["chats"], 30))
    return folder


@pytest.fixture(params=[100, 24, 8], ids=["large windows", "small windows", "no windows"])
def windows(request, monkeypatch):
    monkeypatch.setattr(draws_module, "WINDOW_EXAMPLES", request.param)


def as_pairs(drawn):
    return list(zip(drawn.datasets.tolist(), drawn.examples.tolist(), strict=True))


def of_dataset(drawn, number):
    """The (epoch, example) pairs that batches draw from a dataset, sorted."""
    return sorted(
        (int(epoch), int(example))
        for batch in drawn
        for dataset, example, epoch in zip(
            batch.datasets, batch.examples, batch.epochs, strict=True
        )
        if dataset == number
    )


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("kind", [MixedSampler, SingleDatasetSampler])
def test_each_dataset_is_gone_through_once_an_epoch_at_its_rate(folder, kind):
    stream = kind(open_datasets(folder, {"a": 0.6, "b": 0.4}), 8, group_size=2, seed=1)
    steps = 3 * 25  # Two epochs are 200 examples of 600.
    drawn = [stream[step] for step in range(steps)]
    assert all(len(batch) == 8 for batch in drawn)
    assert of_dataset(drawn, 0) == [(epoch, n) for epoch in range(6) for n in range(SIZES["a"])]
    assert of_dataset(drawn, 1) == [(epoch, n) for epoch in range(6) for n in range(SIZES["b"])]


def test_a_homogeneous_batch_has_one_dataset_and_blocks_keep_to_the_rates(folder):
    stream = SingleDatasetSampler(open_datasets(folder, {"a": 0.8, "b": 0.2}), 8, 2, seed=1)
    numbers = []
    for step in range(1000, 1020):
        (number,) = set(stream[step].datasets.tolist())
        numbers.append(number)
    for start in range(0, 20, 5):
        assert Counter(numbers[start : start + 5]) == {0: 4, 1: 1}


@pytest.mark.usefixtures("windows")
def test_a_mixed_batch_has_all_datasets_at_their_rates(folder):
    stream = MixedSampler(open_datasets(folder, {"a": 0.75, "b": 0.25}), 8, 2, seed=1)
    for step in (0, 1, 77, 1_000_000):
        assert Counter(stream[step].datasets.tolist()) == {0: 6, 1: 2}


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("kind", [MixedSampler, SingleDatasetSampler])
def test_a_step_does_not_depend_on_the_steps_asked_for_before(folder, kind):
    def make():
        return kind(open_datasets(folder, {"a": 0.6, "b": 0.4}), 8, group_size=2, seed=5)

    in_order, backwards = make(), make()
    steps = [*range(12), 999_999, 1_000_000]
    expected = {step: as_pairs(in_order[step]) for step in steps}
    assert {step: as_pairs(backwards[step]) for step in reversed(steps)} == expected
    assert as_pairs(make()[1_000_000]) == expected[1_000_000]


def test_a_window_costs_as_much_at_any_step(folder, monkeypatch):
    stream = MixedSampler(open_datasets(folder, {"a": 1.0}), 8, 2, seed=5)
    made = []
    make = stream._make_window
    monkeypatch.setattr(stream, "_make_window", lambda number: made.append(number) or make(number))
    first = stream[10**9]
    assert len(made) == 1
    assert len(first) == 8


def test_batches_have_about_the_same_number_of_tokens(folder):
    stream = MixedSampler(open_datasets(folder, {"a": 1.0}), 6, 2, seed=5)
    tokens = np.array([stream[step].lengths.sum() for step in range(10)])
    plain = np.array(
        [stream._draw(*stream._turns[np.arange(n * 6, n * 6 + 6)]).lengths.sum() for n in range(10)]
    )
    assert tokens.sum() == plain.sum()
    assert np.ptp(tokens) < np.ptp(plain) / 2


def test_chats_and_embedding_examples_meet_anew_in_each_epoch(folder):
    pairs = SingleDatasetSampler(open_datasets(folder, {"a": 1.0}), 10, 2, seed=1)
    chats = MixedSampler(open_datasets(folder, {"chats": 1.0}), 10, 0, seed=2)
    # An epoch of pairs is 6 steps and one of chats 5: after 30 steps both begin anew.
    met = [
        {
            (p, c)
            for step in range(start, start + 30)
            for p in pairs[step].examples.tolist()
            for c in chats[step].examples.tolist()
        }
        for start in (0, 30, 60)
    ]
    # By chance two such halves share as many as any others; the same order would share all.
    assert len(met[0] & met[1]) < 0.95 * len(met[0])
    assert len(met[1] & met[2]) < 0.95 * len(met[1])
    assert [as_pairs(pairs[s]) for s in range(6)] != [as_pairs(pairs[s]) for s in range(6, 12)]


@pytest.mark.parametrize("rate", [0, -1.0])
def test_a_rate_that_is_not_positive_names_the_dataset(folder, rate):
    with pytest.raises(PreparedDataError, match=f"has b at a rate of {rate}.*prepare"):
        SingleDatasetSampler(open_datasets(folder, {"a": 1.0, "b": rate}), 8, 2, seed=0)


def test_too_few_examples_for_a_batch_name_the_folder(folder):
    with pytest.raises(PreparedDataError, match=r"b/train has 40 examples.*batch of 41"):
        SingleDatasetSampler(open_datasets(folder, {"a": 0.5, "b": 0.5}), 41, 2, seed=0)
    # Of a mixed batch of 60 it has half.
    MixedSampler(open_datasets(folder, {"a": 0.5, "b": 0.5}), 60, 2, seed=0)
    with pytest.raises(
        PreparedDataError, match=r"b/train has 40 examples.*share of a batch, of 48"
    ):
        MixedSampler(open_datasets(folder, {"a": 0.2, "b": 0.8}), 60, 2, seed=0)


counts = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 7)), min_size=1, max_size=12)


def lengths_of(shapes):
    """Lengths of examples with so many positives and negatives."""
    texts = [1 + positives + negatives for positives, negatives in shapes]
    return Lengths(
        tokens=np.ones(sum(texts), np.int32),
        first=np.cumsum([0, *texts]),
        num_positives=np.array([positives for positives, _ in shapes], np.int32),
        fingerprints=np.zeros(sum(texts), np.uint64),
    )


@settings(deadline=None)
@given(shapes=counts, group_size=st.integers(1, 6), epoch=st.integers(0, 9))
def test_a_group_is_the_query_one_positive_and_distinct_negatives(shapes, group_size, epoch):
    lengths = lengths_of(shapes)
    examples = np.arange(len(shapes))
    epochs = np.full(len(shapes), epoch)
    texts = sample_passages(lengths, examples, epochs, group_size, seed=3)
    assert texts.shape == (len(shapes), 1 + group_size)
    for (positives, negatives), first, own in zip(shapes, lengths.first, texts, strict=False):
        own = own - np.where(own < 0, 0, first)
        wanted = min(group_size - 1, negatives)
        assert own[0] == 0
        assert 1 <= own[1] <= positives
        assert len(set(own[2 : 2 + wanted])) == wanted
        assert all(positives < text <= positives + negatives for text in own[2 : 2 + wanted])
        assert (own[2 + wanted :] == -1).all()
    backwards = sample_passages(lengths, examples[::-1], epochs, group_size, seed=3)
    np.testing.assert_array_equal(backwards[::-1], texts)


def test_every_passage_gets_its_turn_and_groups_change_with_epoch_example_and_seed():
    lengths = lengths_of([(3, 5)] * 2)
    epochs = np.arange(6000)

    def groups(example, seed):
        first = lengths.first[example]
        return sample_passages(lengths, np.full(6000, example), epochs, 3, seed) - first

    drawn = groups(0, 0)
    positives, pairs = Counter(drawn[:, 1].tolist()), Counter(map(tuple, drawn[:, 2:].tolist()))
    assert positives.keys() == {1, 2, 3}
    assert all(abs(count - 2000) < 200 for count in positives.values())
    assert len(pairs) == 5 * 4
    assert all(abs(count - 300) < 90 for count in pairs.values())
    assert (drawn != groups(1, 0)).any()
    assert (drawn != groups(0, 1)).any()


def test_a_chat_is_one_text():
    texts = sample_passages(lengths_of([(0, 0)] * 3), np.arange(3), np.zeros(3, int), 0, seed=0)
    np.testing.assert_array_equal(texts, [[0], [1], [2]])
