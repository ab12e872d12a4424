"""Batches: each step holds the texts that its plan names, the same on every machine."""

import dataclasses

import jax
import numpy as np
from prepared_data import write_prepared
import pytest

from grit_jax.data.batches import Batches, RowLengths, number_contents, read_ahead
from grit_jax.data.examples import ChatExample, EmbeddingExample, Text
from grit_jax.data.manifest import Lengths, PreparedDataError, PreparedDataset
from grit_jax.data.schedule import Schedule

ROW_LENGTHS = RowLengths(query=16, passage=24, chat=32)
GROUP_SIZE = 3
ROW_MULTIPLE = 4


def text(random, longest):
    length = int(random.integers(1, longest + 1))
    # Few different tokens: short texts are then copies of each other now and then.
    return Text(random.integers(1, 4, length).astype(np.int32), random.random(length) < 0.5)


def embedding_examples(random, count, longest):
    return [
        EmbeddingExample(
            query=text(random, longest),
            positives=[text(random, longest) for _ in range(random.integers(1, 3))],
            negatives=[text(random, longest) for _ in range(random.integers(0, 4))],
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    random = np.random.default_rng(0)
    write_prepared(folder, "short", embedding_examples(random, 40, 4))
    write_prepared(folder, "long", embedding_examples(random, 30, 16))
    write_prepared(folder, "chats", [ChatExample(text(random, 32)) for _ in range(25)])
    full = [Text(np.ones(length, np.int32), np.ones(length, bool)) for length in (16, 24)]
    write_prepared(folder, "full", [EmbeddingExample(full[0], [full[1]], [full[1]])] * 20)
    return folder


def make_batches(folder, rates=None, with_chats=True, **changes):
    rates = {"short": 0.6, "long": 0.4} if rates is None else rates
    arguments = {
        "row_lengths": ROW_LENGTHS,
        "group_size": GROUP_SIZE,
        "row_multiple": ROW_MULTIPLE,
        "seed": 0,
    }
    datasets = {PreparedDataset(folder, name, "train"): rate for name, rate in rates.items()}
    chats = {PreparedDataset(folder, "chats", "train"): 1.0}
    return Batches(
        Schedule(datasets, 8, seed=1) if rates else None,
        Schedule(chats, 4, seed=2) if with_chats else None,
        **arguments | changes,
    )


@pytest.fixture(scope="module")
def batches(folder):
    return make_batches(folder)


def texts_of(packed):
    """The texts of packed rows by number, each as (tokens, mask); None where there is none."""
    found = []
    for number in range(packed.num_texts):
        place = packed.segment_ids == number + 1
        tokens, mask = packed.tokens[place].tolist(), packed.mask[place].tolist()
        found.append((tokens, mask) if place.any() else None)
    return found


def as_lists(texts):
    return [(text.tokens.tolist(), text.mask.tolist()) for text in texts]


def to_bytes(batch):
    leaves, structure = jax.tree.flatten(batch)
    return str(structure), [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in leaves]


def test_queries_meet_their_own_positive_and_their_own_negatives(batches):
    sizes = set()
    for step in range(25):
        plan, batch = batches.plan(step), batches[step].embedding
        examples = plan.dataset.read([draw.example for draw in plan.draws])
        assert texts_of(batch.queries) == as_lists([example.query for example in examples])
        passages = texts_of(batch.passages)
        assert len(passages) == len(examples) * GROUP_SIZE
        ends = [*batch.positives[1:], sum(passage is not None for passage in passages)]
        for example, start, end in zip(examples, batch.positives, ends, strict=True):
            assert passages[start] in as_lists(example.positives)
            assert end - start == 1 + min(GROUP_SIZE - 1, len(example.negatives))
            assert all(own in as_lists(example.negatives) for own in passages[start + 1 : end])
            sizes.add(int(end - start))
        assert all(passage is None for passage in passages[ends[-1] :])
    assert sizes == {1, 2, 3}


def test_chats_are_those_of_the_plan(batches):
    for step in range(10):
        plan = batches.plan(step)
        examples = plan.chat_dataset.read([draw.example for draw in plan.chat_draws])
        assert texts_of(batches[step].chats) == as_lists([example.chat for example in examples])


def test_contents_are_equal_just_where_passages_are(batches):
    copies = 0
    for step in range(25):
        batch = batches[step].embedding
        passages = texts_of(batch.passages)
        contents = batch.passage_contents.tolist()
        assert [content == -1 for content in contents] == [p is None for p in passages]
        pairs = [(p[0], c) for p, c in zip(passages, contents, strict=True) if p is not None]
        for tokens, content in pairs:
            for other_tokens, other_content in pairs:
                assert (content == other_content) == (tokens == other_tokens)
        copies += len(pairs) - len({content for _, content in pairs})
    assert copies


def test_texts_that_begin_alike_have_different_contents():
    texts = [Text(np.array(ids, np.int32), np.ones(len(ids), bool)) for ids in ([1, 2], [1, 2, 3])]
    np.testing.assert_array_equal(number_contents([*texts, None, texts[0]]), [0, 1, -1, 0])


def shape_of(batch):
    return tuple(
        None if texts is None else texts.tokens.shape
        for texts in (
            batch.embedding and batch.embedding.queries,
            batch.embedding and batch.embedding.passages,
            batch.chats,
        )
    )


def test_a_run_has_at_most_four_shapes_and_row_counts_that_shards_divide(batches):
    shapes = {shape_of(batches[step]) for step in range(100)}
    assert len(shapes) <= 4
    assert len(batches.shapes) <= 4
    for shape in shapes:
        rows, lengths = zip(*shape, strict=True)
        assert all(count > 0 and count % ROW_MULTIPLE == 0 for count in rows)
        assert lengths == (ROW_LENGTHS.query, ROW_LENGTHS.passage, ROW_LENGTHS.chat)


def test_short_texts_do_not_pay_for_rows_of_long_ones(batches):
    rows = {"short": set(), "long": set()}
    for step in range(20):
        rows[batches.plan(step).dataset.name].add(batches[step].embedding.passages.tokens.shape[0])
    assert max(rows["short"]) < min(rows["long"])


def test_a_step_fuller_than_all_that_were_looked_at_still_fits(folder):
    batches = make_batches(folder, {"short": 0.99, "full": 0.01})
    steps = range(200)
    full = [step for step in steps if batches.plan(step).dataset.name == "full"]
    assert full
    assert full[0] >= 64, "the first steps must not show how full a step can be"
    for step in full:
        queries = texts_of(batches[step].embedding.queries)
        assert [len(tokens) for tokens, _ in queries] == [ROW_LENGTHS.query] * 8
    assert len({shape_of(batches[step]) for step in steps}) <= 4


def test_the_same_step_is_the_same_to_the_byte_wherever_it_is_read(folder, batches):
    others = make_batches(folder)
    steps = (0, 1, 2, 3, 50, 100_000)
    expected = {step: to_bytes(batches[step]) for step in steps}
    assert {step: to_bytes(others[step]) for step in reversed(steps)} == expected
    assert others.shapes == batches.shapes


def test_another_seed_draws_other_passages_of_the_same_examples(folder, batches):
    other = make_batches(folder, seed=1)
    assert [other.plan(step).draws for step in range(5)] == [
        batches.plan(step).draws for step in range(5)
    ]
    assert [other.plan(step).passages for step in range(5)] != [
        batches.plan(step).passages for step in range(5)
    ]


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (41, 47), (3, 3)])
def test_reading_ahead_yields_the_steps_asked_for_in_order(folder, batches, start, stop):
    ahead = [to_bytes(batch) for batch in read_ahead(make_batches(folder), start, stop)]
    assert ahead == [to_bytes(batches[step]) for step in range(start, stop)]


def test_a_run_on_one_stream_has_no_other(folder):
    only_embedding = make_batches(folder, with_chats=False)[0]
    only_chats = make_batches(folder, rates={})[0]
    assert only_embedding.chats is None
    assert only_embedding.embedding is not None
    assert only_chats.embedding is None
    assert only_chats.chats is not None


def test_groups_of_one_have_no_negatives(folder):
    batch = make_batches(folder, group_size=1)[0].embedding
    np.testing.assert_array_equal(batch.positives, np.arange(8))
    assert batch.passages.num_texts == 8


@pytest.mark.parametrize("stream", ["query", "passage", "chat"])
def test_a_text_longer_than_its_row_names_field_and_folder(folder, stream):
    short = dataclasses.replace(ROW_LENGTHS, **{stream: 8})
    with pytest.raises(PreparedDataError) as error:
        make_batches(folder, row_lengths=short)
    name = "chats" if stream == "chat" else "long"
    assert f"config.data.{stream}_row_length=8" in str(error.value)
    assert str(folder / name / "train") in str(error.value)


def test_the_embedded_sample_gives_batches(prepared_sample):
    rates = {"wordnet_senses": 0.8, "jargon_entries": 0.2}
    datasets = {PreparedDataset(prepared_sample, n, "train"): rate for n, rate in rates.items()}
    batches = Batches(
        Schedule(datasets, 16, seed=0),
        None,
        row_lengths=RowLengths(query=128, passage=128, chat=128),
        group_size=2,
        row_multiple=8,
        seed=0,
    )
    for step in range(10):
        batch = batches[step].embedding
        assert all(tokens[0] == 1 for tokens, _ in texts_of(batch.queries)), "<s> comes first"
        for tokens, mask in texts_of(batch.queries):
            assert 0 < sum(mask) < len(tokens)


def test_lengths_are_found_by_example():
    random = np.random.default_rng(3)
    examples = embedding_examples(random, 10, 9)
    lengths = Lengths.of(examples)
    for number, example in enumerate(examples):
        assert lengths[number].tolist() == [len(own) for own in example.texts]
        assert lengths.num_positives[number] == len(example.positives)
