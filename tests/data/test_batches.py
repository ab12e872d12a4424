"""Batches: each step holds the texts of its plan, identically on every host."""

import dataclasses
import hashlib
import struct

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
from prepared_data import chat_examples, embedding_examples, open_datasets, write_prepared
import pytest

from grit_jax.data.batch import Batch, ChatBatch
from grit_jax.data.batches import Batches, read_ahead
from grit_jax.data.kinds import deduplicated_ids
from grit_jax.data.manifest import Lengths, PreparedDataError, text_fingerprint
from grit_jax.data.sampling import MixedSampler, SingleDatasetSampler
from grit_jax.data.shapes import RowLimits
from grit_jax.text.examples import EmbeddingExample, Text

ROW_LENGTHS = {"query": 16, "passage": 24, "chat": 32}
GROUP_SIZE = 3
SHARDS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    random = np.random.default_rng(0)
    write_prepared(folder, "short", embedding_examples(random, 40, 4))
    write_prepared(folder, "long", embedding_examples(random, 30, 16))
    write_prepared(folder, "chats", chat_examples(random, 25, 32))
    write_prepared(folder, "short_chats", chat_examples(random, 25, 8))
    full = [Text(np.ones(length, np.int32), np.ones(length, bool)) for length in (16, 24)]
    write_prepared(folder, "full", [EmbeddingExample(full[0], [full[1]], [full[1]])] * 20)
    return folder


def make_batches(
    folder,
    rates=None,
    chat_rates=None,
    embedding=SingleDatasetSampler,
    generative=MixedSampler,
    batch_sizes=(8, 4),
    group_size=GROUP_SIZE,
    shards=SHARDS,
    row_lengths=ROW_LENGTHS,
    seed=1,
    **changes,
):
    rates = {"short": 0.6, "long": 0.4} if rates is None else rates
    chat_rates = {"chats": 1.0} if chat_rates is None else chat_rates
    samplers = {}
    if rates:
        samplers["embedding"] = embedding(
            open_datasets(folder, rates), batch_sizes[0], group_size, seed
        )
    if chat_rates:
        samplers["generative"] = generative(
            open_datasets(folder, chat_rates), batch_sizes[1], 0, seed + 1
        )
    limits = RowLimits(longest=row_lengths, length_multiple=8, count_multiple=shards)
    return Batches(samplers, limits, **changes)


@pytest.fixture(scope="module")
def batches(folder):
    return make_batches(folder)


@pytest.fixture(scope="module", params=[SingleDatasetSampler, MixedSampler])
def any_batches(request, folder):
    chats = {"chats": 0.5, "short_chats": 0.5}
    return make_batches(folder, chat_rates=chats, embedding=request.param, generative=request.param)


def test_passes_count_how_often_each_dataset_is_read(any_batches):
    steps = 200
    counts = {}
    for sampler in any_batches.samplers.values():
        for batch in range(steps):
            for dataset in sampler[batch].datasets:
                name = sampler.datasets[dataset].name
                counts[name] = counts.get(name, 0) + 1
    sizes = {"short": 40, "long": 30, "chats": 25, "short_chats": 25}
    expected = {name: counts[name] / size for name, size in sizes.items()}
    assert any_batches.passes(steps) == pytest.approx(expected)


def texts_of(packed):
    """The texts of packed rows, each as (tokens, mask); None for an unused index."""
    found = []
    for index in range(packed.num_texts):
        is_own = packed.segment_ids == index + 1
        tokens, mask = packed.tokens[is_own].tolist(), packed.mask[is_own].tolist()
        found.append((tokens, mask) if is_own.any() else None)
    return found


def as_lists(texts):
    return [(text.tokens.tolist(), text.mask.tolist()) for text in texts]


def to_bytes(batch):
    leaves, structure = jax.tree.flatten(batch)
    return str(structure), [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in leaves]


def examples_of(batches, kind, step):
    """The examples that a step samples, in order."""
    sampled = batches.plans[step].sampled[kind]
    datasets = batches.samplers[kind].datasets
    pairs = zip(sampled.datasets, sampled.examples, strict=True)
    return [datasets[dataset].read([int(example)])[0] for dataset, example in pairs]


def test_queries_meet_their_own_positive_and_their_own_negatives(any_batches):
    sizes = set()
    for step in range(25):
        batch = any_batches[step].parts["embedding"]
        examples = examples_of(any_batches, "embedding", step)
        assert texts_of(batch.queries) == as_lists([example.query for example in examples])
        passages = texts_of(batch.passages)
        assert len(passages) == len(examples) * GROUP_SIZE
        for example, positive in zip(examples, batch.positives, strict=True):
            group = passages[positive : positive + GROUP_SIZE]
            count = 1 + min(GROUP_SIZE - 1, len(example.negatives))
            assert group[0] in as_lists(example.positives)
            assert all(own in as_lists(example.negatives) for own in group[1:count])
            assert group[count:] == [None] * (GROUP_SIZE - count)
            sizes.add(count)
    assert sizes == {1, 2, 3}


def test_chats_are_those_of_the_plan(any_batches):
    for step in range(10):
        examples = examples_of(any_batches, "generative", step)
        chats = [example.chat for example in examples]
        assert texts_of(any_batches[step].parts["generative"].chats) == as_lists(chats)


def test_tokens_are_counted(any_batches):
    for step in range(5):
        batch = any_batches[step]
        packed = batch.streams.values()
        assert len(packed) == 3
        assert batch.num_tokens == sum(np.count_nonzero(texts.segment_ids) for texts in packed)


@pytest.mark.parametrize("stream", ["queries", "passages"])
def test_ids_are_equal_exactly_for_equal_texts(any_batches, stream):
    copies = 0
    for step in range(25):
        batch = any_batches[step].parts["embedding"]
        texts = texts_of(getattr(batch, stream))
        ids = {"queries": batch.query_ids, "passages": batch.passage_ids}[stream].tolist()
        assert [text_id == -1 for text_id in ids] == [text is None for text in texts]
        tokens = [None if text is None else text[0] for text in texts]
        for text, text_id in zip(tokens, ids, strict=True):
            assert text is None or text_id == tokens.index(text)
        used = [text_id for text_id in ids if text_id >= 0]
        copies += len(used) - len(set(used))
    assert copies


def test_copies_may_be_negatives_as_in_the_original(folder, batches):
    other = make_batches(
        folder, duplicate_positives_are_negatives=True, same_query_positives_are_negatives=True
    )
    for step in range(5):
        assert other[step].parts["embedding"].query_ids is None
        masked, plain = (b[step].parts["embedding"].passage_ids for b in (batches, other))
        np.testing.assert_array_equal(masked == -1, plain == -1)
        used = plain[plain >= 0]
        assert len(set(used.tolist())) == len(used)


def test_texts_with_a_common_prefix_have_different_fingerprints():
    texts = [Text(np.array(ids, np.int32), np.ones(len(ids), bool)) for ids in ([1, 2], [1, 2, 3])]
    copies = [*texts, texts[0], texts[0]]
    fingerprints = np.array([text_fingerprint(text) for text in copies], np.uint64)
    np.testing.assert_array_equal(deduplicated_ids(fingerprints), [0, 1, 0, 0])
    used = [False, True, True, True]
    np.testing.assert_array_equal(deduplicated_ids(fingerprints, used), [-1, 1, 2, 2])


def test_fingerprints_are_the_same_on_every_machine():
    text = Text(np.array([1, 500, 70_000], np.int32), np.zeros(3, bool))
    assert text_fingerprint(text) == int.from_bytes(
        hashlib.blake2b(struct.pack("<3i", 1, 500, 70_000), digest_size=8).digest(), "big"
    )


def shape_of(batch):
    return tuple(texts.tokens.shape for texts in batch.streams.values())


def test_a_run_has_at_most_four_shapes_and_row_counts_that_shards_divide(any_batches):
    shapes = {shape_of(any_batches[step]) for step in range(100)}
    assert len(shapes) <= 4
    assert len(any_batches.shapes) <= 4
    for shape in shapes:
        rows, lengths = zip(*shape, strict=True)
        assert all(count > 0 and count % SHARDS == 0 for count in rows)
        for length, most in zip(lengths, ROW_LENGTHS.values(), strict=True):
            assert length <= most


def test_steps_of_short_texts_have_smaller_rows(folder):
    batches = make_batches(folder, shards=1)
    sizes = {0: set(), 1: set()}
    for step in range(20):
        (dataset,) = set(batches.plans[step].sampled["embedding"].datasets.tolist())
        sizes[dataset].add(batches[step].streams["passage"].tokens.size)
    assert max(sizes[0]) < min(sizes[1])


def test_a_step_larger_than_all_previewed_steps_still_fits(folder, monkeypatch):
    plain = MixedSampler.previews
    # Only batches of the first dataset are previewed.
    monkeypatch.setattr(
        SingleDatasetSampler, "previews", lambda self: plain(self.samplers[0], windows=1)
    )
    batches = make_batches(folder, {"short": 0.9, "full": 0.1})
    steps = range(40)
    full = [s for s in steps if batches.plans[s].sampled["embedding"].datasets[0] == 1]
    assert full
    for step in full:
        queries = texts_of(batches[step].streams["query"])
        assert [len(tokens) for tokens, _ in queries] == [ROW_LENGTHS["query"]] * 8
    assert len({shape_of(batches[step]) for step in steps}) <= 4


def test_an_empty_batch_has_the_rows_of_all_hosts_and_no_text(folder):
    host = make_batches(folder, local_shards=[2])
    for shape in host.shapes:
        batch = host.empty(shape)
        rows = zip(shape.values(), shape_of(batch), strict=True)
        assert all((each.count, each.length) == found for each, found in rows)
        assert not np.any(batch.streams["query"].segment_ids)
        assert batch.num_tokens == 0


def joined(hosts):
    """The whole batch: the rows of all hosts, and the other arrays of the first host."""
    first, pairs = hosts[0], [host.parts["embedding"] for host in hosts]
    for host, own in zip(hosts[1:], pairs[1:], strict=True):
        np.testing.assert_array_equal(own.positives, pairs[0].positives)
        np.testing.assert_array_equal(own.passage_ids, pairs[0].passage_ids)
        np.testing.assert_array_equal(own.query_ids, pairs[0].query_ids)
        assert host.num_tokens == first.num_tokens

    def rows(name):
        texts = [host.streams[name] for host in hosts]
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *texts)

    embedding = dataclasses.replace(pairs[0], queries=rows("query"), passages=rows("passage"))
    chats = ChatBatch(rows("chat"))
    return Batch({"embedding": embedding, "generative": chats}, first.num_tokens)


@pytest.mark.slow
@settings(deadline=None, max_examples=12)
@given(
    step=st.integers(0, 2_000_000),
    hosts=st.sampled_from([1, 2, 4, 8]),
    threads=st.integers(1, 4),
    mixed=st.booleans(),
)
def test_hosts_and_threads_give_the_same_bytes_at_any_step(folder, step, hosts, threads, mixed):
    embedding = MixedSampler if mixed else SingleDatasetSampler
    arguments = {"embedding": embedding, "batch_sizes": (24, 24)}
    whole = make_batches(folder, **arguments)[step]
    assert whole.streams["chat"].num_rows > SHARDS
    share = SHARDS // hosts
    parts = []
    for host in range(hosts):
        held = range(host * share, (host + 1) * share)
        own = make_batches(folder, **arguments, local_shards=held)
        # A resumed run reads no earlier steps.
        *_, part = read_ahead(own, max(0, step - 1), step + 1, threads=threads)
        parts.append(part)
        assert len(part.streams["chat"].tokens) == part.streams["chat"].num_rows // hosts
    assert to_bytes(joined(parts)) == to_bytes(whole)


def test_a_host_reads_only_the_examples_of_its_rows(folder, monkeypatch):
    host = make_batches(folder, local_shards=[2])
    for step in range(10):
        read = {"embedding": 0, "generative": 0}
        for kind, sampler in host.samplers.items():
            for dataset in sampler.datasets:
                plain = type(dataset).read.__get__(dataset)

                def counting(indices, kind=kind, plain=plain, read=read):
                    read[kind] += len(indices)
                    return plain(indices)

                monkeypatch.setattr(dataset, "read", counting)
        batch = host[step]
        monkeypatch.undo()
        texts = {name: np.unique(rows.segment_ids) for name, rows in batch.streams.items()}
        own = {number - 1 for number in texts["query"].tolist() if number}
        own |= {(number - 1) // GROUP_SIZE for number in texts["passage"].tolist() if number}
        assert read["embedding"] == len(own)
        assert read["generative"] == len(set(texts["chat"]) - {0})


def test_another_seed_samples_other_examples(folder, batches):
    other = make_batches(folder, seed=5)
    assert to_bytes(other[0]) != to_bytes(batches[0])


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (41, 47), (3, 3)])
def test_reading_ahead_yields_the_steps_asked_for_in_order(folder, batches, start, stop):
    ahead = [to_bytes(batch) for batch in read_ahead(make_batches(folder), start, stop)]
    assert ahead == [to_bytes(batches[step]) for step in range(start, stop)]


def test_every_thread_that_is_asked_for_reads(folder, batches, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        assert len(list(read_ahead(batches, 0, 3, threads=6))) == 3
    assert "limit the number of threads" not in caplog.text


def test_a_run_on_one_kind_of_text_has_no_other(folder):
    assert make_batches(folder, chat_rates={})[0].parts.keys() == {"embedding"}
    assert make_batches(folder, rates={})[0].parts.keys() == {"generative"}


def test_groups_of_one_have_no_negatives(folder):
    batch = make_batches(folder, group_size=1)[0].parts["embedding"]
    np.testing.assert_array_equal(batch.positives, np.arange(8))
    assert batch.passages.num_texts == 8


@pytest.mark.parametrize("stream", ["query", "passage", "chat"])
def test_a_text_longer_than_its_row_names_field_and_folder(folder, stream):
    with pytest.raises(PreparedDataError) as error:
        make_batches(folder, row_lengths=ROW_LENGTHS | {stream: 8})
    name = "chats" if stream == "chat" else "long"
    assert f"config.data.{stream}_row_length=8" in str(error.value)
    assert str(folder / name / "train") in str(error.value)


def sample_batches(prepared_sample):
    pairs = {"wordnet_senses": 0.8, "jargon_entries": 0.2}
    chats = {"wordnet_chat": 0.75, "jargon_chat": 0.25}
    samplers = {
        "embedding": SingleDatasetSampler(open_datasets(prepared_sample, pairs), 128, 2, seed=0),
        "generative": MixedSampler(open_datasets(prepared_sample, chats), 8, 0, seed=1),
    }
    longest = dict.fromkeys(("query", "passage", "chat"), 512)
    return Batches(samplers, RowLimits(longest=longest, length_multiple=8, count_multiple=1))


@pytest.mark.slow
def test_rows_of_the_embedded_sample_have_at_most_5_percent_padding(prepared_sample):
    batches = sample_batches(prepared_sample)
    plans = [batches.plans[step] for step in range(500, 700)]
    for name in ("query", "passage", "chat"):
        tokens = sum(plan.streams[name].lengths.sum() for plan in plans)
        capacity = sum(plan.shape[name].capacity for plan in plans)
        assert tokens / capacity >= 0.95, name


def test_texts_of_the_embedded_sample_are_whole(prepared_sample):
    batches = sample_batches(prepared_sample)
    for step in range(3):
        for tokens, mask in texts_of(batches[step].streams["query"]):
            assert tokens[0] == 1, "<s> comes first"
            assert 0 < sum(mask) < len(tokens)


def test_lengths_are_found_by_example():
    random = np.random.default_rng(3)
    examples = embedding_examples(random, 10, 9)
    lengths = Lengths.of(examples)
    assert len(lengths.fingerprints) == len(lengths.tokens)
    for number, example in enumerate(examples):
        assert lengths[number].tolist() == [len(own) for own in example.texts]
        assert lengths.num_positives[number] == len(example.positives)
