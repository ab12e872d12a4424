"""Sampling: the examples of a step are a pure function of datasets, seed and step."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from prepared_data import chat_examples, embedding_examples, open_datasets, write_prepared
import pytest

from grit_jax.data import sampling
from grit_jax.data.kinds import BATCH_KINDS, sample_passages
from grit_jax.data.manifest import Lengths, PreparedDataError
from grit_jax.data.mixing import EpochShuffle, RoundSchedule
from grit_jax.data.sampling import MixedSampler, SingleDatasetSampler

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
    monkeypatch.setattr(sampling, "WINDOW_EXAMPLES", request.param)


def as_pairs(sampled):
    return list(zip(sampled.datasets.tolist(), sampled.examples.tolist(), strict=True))


def of_dataset(batches, index):
    """The (epoch, example) pairs that batches sample from a dataset, sorted."""
    return sorted(
        (int(epoch), int(example))
        for batch in batches
        for dataset, example, epoch in zip(
            batch.datasets, batch.examples, batch.epochs, strict=True
        )
        if dataset == index
    )


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("make", [MixedSampler, SingleDatasetSampler])
def test_each_dataset_is_sampled_once_per_epoch_at_its_rate(folder, make):
    sampler = make(open_datasets(folder, {"a": 0.6, "b": 0.4}), 8, group_size=2, seed=1)
    steps = 3 * 25  # Two epochs are 200 examples of 600.
    batches = [sampler[step] for step in range(steps)]
    assert all(len(batch) == 8 for batch in batches)
    assert of_dataset(batches, 0) == [(epoch, n) for epoch in range(6) for n in range(SIZES["a"])]
    assert of_dataset(batches, 1) == [(epoch, n) for epoch in range(6) for n in range(SIZES["b"])]


def test_a_batch_of_one_dataset_follows_the_rates_in_each_block(folder):
    sampler = SingleDatasetSampler(open_datasets(folder, {"a": 0.8, "b": 0.2}), 8, 2, seed=1)
    datasets = []
    for step in range(1000, 1020):
        (dataset,) = set(sampler[step].datasets.tolist())
        datasets.append(dataset)
    for start in range(0, 20, 5):
        assert Counter(datasets[start : start + 5]) == {0: 4, 1: 1}


@pytest.mark.usefixtures("windows")
def test_a_mixed_batch_has_all_datasets_at_their_rates(folder):
    sampler = MixedSampler(open_datasets(folder, {"a": 0.75, "b": 0.25}), 8, 2, seed=1)
    for step in (0, 1, 77, 1_000_000):
        assert Counter(sampler[step].datasets.tolist()) == {0: 6, 1: 2}


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("sampler", [MixedSampler, SingleDatasetSampler])
def test_a_step_does_not_depend_on_the_steps_sampled_before(folder, sampler):
    def make():
        return sampler(open_datasets(folder, {"a": 0.6, "b": 0.4}), 8, group_size=2, seed=5)

    in_order, backwards = make(), make()
    steps = [*range(12), 999_999, 1_000_000]
    expected = {step: as_pairs(in_order[step]) for step in steps}
    assert {step: as_pairs(backwards[step]) for step in reversed(steps)} == expected
    assert as_pairs(make()[1_000_000]) == expected[1_000_000]


def test_any_step_costs_one_window(folder, monkeypatch):
    sampler = MixedSampler(open_datasets(folder, {"a": 1.0}), 8, 2, seed=5)
    counts = []
    plain = EpochShuffle.__getitem__

    def counting(self, positions):
        counts.append(len(positions))
        return plain(self, positions)

    monkeypatch.setattr(EpochShuffle, "__getitem__", counting)
    assert len(sampler[10**9]) == 8
    assert sum(counts) <= SIZES["a"]


def test_batches_have_about_the_same_number_of_tokens(folder, monkeypatch):
    def tokens_of_steps():
        sampler = MixedSampler(open_datasets(folder, {"a": 1.0}), 6, 2, seed=5)
        return np.array([sampler[step].lengths.sum() for step in range(10)])

    tokens = tokens_of_steps()
    monkeypatch.setattr(sampling, "WINDOW_EXAMPLES", 6)  # One batch, so nothing is balanced.
    plain = tokens_of_steps()
    assert tokens.sum() == plain.sum()
    assert np.ptp(tokens) < np.ptp(plain) / 2


def test_chats_and_embedding_examples_are_combined_anew_in_each_epoch(folder):
    pairs = SingleDatasetSampler(open_datasets(folder, {"a": 1.0}), 10, 2, seed=1)
    chats = MixedSampler(open_datasets(folder, {"chats": 1.0}), 10, 0, seed=2)
    # An epoch of pairs is 6 steps and one of chats 5: after 30 steps both start a new epoch.
    combined = [
        {
            (p, c)
            for step in range(start, start + 30)
            for p in pairs[step].examples.tolist()
            for c in chats[step].examples.tolist()
        }
        for start in (0, 30, 60)
    ]
    # Two random halves share about half of the combinations; the same order would share all.
    assert len(combined[0] & combined[1]) < 0.95 * len(combined[0])
    assert len(combined[1] & combined[2]) < 0.95 * len(combined[1])
    assert [as_pairs(pairs[s]) for s in range(6)] != [as_pairs(pairs[s]) for s in range(6, 12)]


@pytest.mark.parametrize("rate", [0, -1.0])
def test_a_rate_that_is_not_positive_names_the_dataset(folder, rate):
    with pytest.raises(PreparedDataError, match=f"has b at a rate of {rate}.*prepare"):
        SingleDatasetSampler(open_datasets(folder, {"a": 1.0, "b": rate}), 8, 2, seed=0)


def test_too_few_examples_for_a_batch_name_the_folder(folder):
    with pytest.raises(PreparedDataError, match=r"b/train has 40 examples.*batch of 41"):
        SingleDatasetSampler(open_datasets(folder, {"b": 0.5}), 41, 2, seed=0)
    with pytest.raises(
        PreparedDataError, match=r"a/train has 60 examples.*share of a batch, of 61"
    ):
        SingleDatasetSampler(open_datasets(folder, {"a": 60, "b": 40}), 101, 2, seed=0)
    # Half of a mixed batch of 60 is 30 examples.
    MixedSampler(open_datasets(folder, {"a": 0.5, "b": 0.5}), 60, 2, seed=0)
    with pytest.raises(
        PreparedDataError, match=r"b/train has 40 examples.*share of a batch, of 48"
    ):
        MixedSampler(open_datasets(folder, {"a": 0.2, "b": 0.8}), 60, 2, seed=0)


@pytest.mark.usefixtures("windows")
def test_datasets_smaller_than_a_batch_share_batches(folder):
    sizes = {"large": 90, "small": 7, "tiny": 1, "medium": 22}
    random = np.random.default_rng(1)
    for name, size in sizes.items():
        write_prepared(folder, name, embedding_examples(random, size, 8))

    def make(rates=sizes, batch_size=30):
        return SingleDatasetSampler(open_datasets(folder, rates), batch_size, 2, seed=5)

    sampler = make()
    assert sampler.sharing == [1, 2, 3] and sampler.turns == list(sizes.values())
    assert sampler.describe_sharing().startswith(
        "3 of 4 embedding datasets are too small for batches of their own (30): their 30 examples "
        "share 25.0% of the batches"
    )
    steps = 3 * 4  # Three epochs of all 120 examples.
    batches = [sampler[step] for step in range(steps)]
    for index, size in enumerate(sizes.values()):
        expected = [(epoch, n) for epoch in range(3) for n in range(size)]
        assert of_dataset(batches, index) == expected
    assert sorted(len(set(batch.datasets.tolist())) for batch in batches) == [1] * 9 + [3] * 3
    # Any step can be resumed at.
    assert [as_pairs(make()[step]) for step in (11, 3)] == [as_pairs(batches[n]) for n in (11, 3)]
    assert make({"large": 90, "a": 60}).describe_sharing() is None
    # Too few for a batch together: the next larger dataset joins them.
    assert make({"large": 90, "a": 60, "tiny": 1, "small": 7}).sharing == [1, 2, 3]


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.lists(st.sampled_from([0.5, 1, 2, 3.5]), min_size=6, max_size=6),
    st.booleans(),
)
def test_a_round_has_one_run_of_each_dataset(sizes, rates, is_by_size):
    rates = sizes if is_by_size else rates[: len(sizes)]
    schedule = RoundSchedule(rates, sizes, "seed")
    datasets, positions = schedule[np.arange(5 * len(schedule))]
    assert not is_by_size or schedule.counts.tolist() == sizes
    np.testing.assert_allclose(
        schedule.counts / len(schedule), np.array(rates) / sum(rates), atol=1e-9
    )
    for round_ in np.split(datasets, 5):
        changes = 1 + np.count_nonzero(np.diff(round_))
        assert changes == len(sizes)
        np.testing.assert_array_equal(np.bincount(round_, minlength=len(sizes)), schedule.counts)
    for index, count in enumerate(schedule.counts):
        np.testing.assert_array_equal(positions[datasets == index], np.arange(5 * count))
    later = np.arange(2 * len(schedule), 3 * len(schedule))[::-1]
    np.testing.assert_array_equal(schedule[later], (datasets[later], positions[later]))


counts = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 7)), min_size=1, max_size=12)


def lengths_of(shapes):
    """Lengths of examples with these numbers of positives and negatives."""
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


def test_groups_are_uniform_and_change_with_epoch_example_and_seed():
    lengths = lengths_of([(3, 5)] * 2)
    epochs = np.arange(6000)

    def groups(example, seed):
        first = lengths.first[example]
        return sample_passages(lengths, np.full(6000, example), epochs, 3, seed) - first

    sampled = groups(0, 0)
    positives = Counter(sampled[:, 1].tolist())
    pairs = Counter(map(tuple, sampled[:, 2:].tolist()))
    assert positives.keys() == {1, 2, 3}
    assert all(abs(count - 2000) < 200 for count in positives.values())
    assert len(pairs) == 5 * 4
    assert all(abs(count - 300) < 90 for count in pairs.values())
    assert (sampled != groups(1, 0)).any()
    assert (sampled != groups(0, 1)).any()


def test_a_chat_is_one_text():
    sample_texts = BATCH_KINDS["generative"].sample_texts
    texts = sample_texts(lengths_of([(0, 0)] * 3), np.arange(3), np.zeros(3, int), 0, seed=0)
    np.testing.assert_array_equal(texts, [[0], [1], [2]])
