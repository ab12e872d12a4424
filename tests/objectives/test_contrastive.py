"""The contrastive loss against a softmax cross-entropy written as loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.objectives import contrastive
from grit_jax.objectives.contrastive import contrastive_loss
from grit_jax.sharding import make_mesh

DIMENSION = 6
TEMPERATURE = 0.1


def embeddings(count, seed):
    vectors = np.random.default_rng(seed).normal(size=(count, DIMENSION))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def loss_by_hand(queries, passages, positives, contents, temperature, query_contents=range(8)):
    pairs = set(zip(query_contents, contents[positives], strict=True))
    losses = []
    for query, query_content, positive in zip(queries, query_contents, positives, strict=True):
        own = np.exp(query @ passages[positive] / temperature)
        total = own
        for passage, content in zip(passages, contents, strict=True):
            if content != -1 and (query_content, content) not in pairs:
                total += np.exp(query @ passage / temperature)
        losses.append(-np.log(own / total))
    return np.mean(losses)


def reverse_loss_by_hand(queries, passages, positives, contents, query_contents=range(8)):
    """The other way round: the positives look for their queries among all queries."""
    pairs = set(zip(query_contents, contents[positives], strict=True))
    losses = []
    for number, positive in enumerate(positives):
        scores = np.exp(queries @ passages[positive] / TEMPERATURE)
        negatives = [(content, contents[positive]) not in pairs for content in query_contents]
        losses.append(-np.log(scores[number] / (scores[number] + scores[negatives].sum())))
    return np.mean(losses)


# Queries 1 and 6 are copies of 0, and 3 of 2; 2 and 3 also have the same positive.
QUERY_CONTENTS = np.array([0, 0, 2, 2, 4, 5, 0, 7])


@pytest.fixture
def batch():
    """8 queries and 16 passages: 5 is a copy of 0, 7 a copy of 3, and the last two are unused."""
    passages = embeddings(16, 1)
    contents = np.arange(16)
    for copy, first in ((5, 0), (7, 3)):
        passages[copy], contents[copy] = passages[first], first
    passages[14:], contents[14:] = 0, -1
    # Two queries have the same passage as their positive, two others copies of one.
    positives = np.array([0, 2, 3, 3, 5, 9, 11, 12])
    return embeddings(8, 0), passages, positives, contents


def compute(
    queries, passages, positives, contents, temperature=TEMPERATURE, query_ids=None, **options
):
    return contrastive_loss(
        jnp.asarray(queries),
        jnp.asarray(passages),
        jnp.asarray(positives),
        jnp.asarray(contents),
        temperature,
        query_ids=None if query_ids is None else jnp.asarray(query_ids),
        **options,
    )


def test_a_positive_of_a_copy_of_the_query_is_no_negative(batch):
    expected = loss_by_hand(*batch, TEMPERATURE, QUERY_CONTENTS)
    assert expected < loss_by_hand(*batch, TEMPERATURE) - 0.03
    loss = compute(*batch, query_ids=QUERY_CONTENTS)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    queries, passages, positives, contents = batch
    # All queries are one: only negatives that are nobody's positive are left.
    one = np.zeros(8, int)
    loss = compute(queries[[0] * 8], passages, positives, contents, query_ids=one)
    expected = loss_by_hand(queries[[0] * 8], passages, positives, contents, TEMPERATURE, one)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_it_is_a_softmax_over_all_passages(batch, temperature):
    expected = loss_by_hand(*batch, temperature)
    assert expected > 0.1
    np.testing.assert_allclose(compute(*batch, temperature), expected, rtol=1e-4)


def test_unused_places_change_nothing(batch):
    queries, passages, positives, contents = batch
    shorter = compute(queries, passages[:14], positives, contents[:14])
    np.testing.assert_allclose(compute(*batch), shorter, rtol=1e-6)
    passages[14:] = queries[:2]
    np.testing.assert_allclose(compute(*batch), shorter, rtol=1e-6)


def test_a_copy_of_the_positive_is_no_negative(batch):
    queries, passages, positives, contents = batch
    np.testing.assert_allclose(
        compute(queries[:1], passages, positives[:1], contents),
        compute(queries[:1], np.delete(passages, 5, 0), positives[:1], np.delete(contents, 5)),
        rtol=1e-6,
    )
    distinct = compute(queries[:1], passages, positives[:1], np.arange(16))
    assert distinct > compute(queries[:1], passages, positives[:1], contents)


def test_the_gradient_is_finite_and_leaves_unused_places_alone(batch):
    queries, passages, positives, contents = batch
    of_queries, of_passages = jax.grad(
        lambda q, p: compute(q, p, positives, contents), argnums=(0, 1)
    )(jnp.asarray(queries), jnp.asarray(passages))
    assert np.isfinite(of_queries).all()
    assert np.isfinite(of_passages).all()
    assert not of_passages[14:].any()
    assert of_passages[:14].any(axis=1).all()
    assert of_queries.any(axis=1).all()


def test_a_query_without_any_negative_costs_nothing():
    queries, passages = embeddings(1, 0), embeddings(2, 1)
    contents = np.array([0, -1])
    assert compute(queries, passages, np.array([0]), contents) == 0
    gradient = jax.grad(lambda q: compute(q, passages, np.array([0]), contents))(
        jnp.asarray(queries)
    )
    assert not gradient.any()


def test_devices_see_the_passages_of_all_devices(batch):
    loss_and_gradient = jax.value_and_grad(
        functools.partial(compute, query_ids=QUERY_CONTENTS), argnums=(0, 1)
    )
    arguments = [jnp.asarray(part) for part in batch]
    expected = loss_and_gradient(*arguments)
    with jax.set_mesh(make_mesh()):
        on_mesh = jax.jit(loss_and_gradient)(*arguments)
    for ours, alone in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("query_contents", [np.arange(8), QUERY_CONTENTS], ids=["all", "copies"])
def test_the_symmetric_loss_is_the_mean_of_both_directions(batch, query_contents):
    of_queries = loss_by_hand(*batch, TEMPERATURE, query_contents)
    of_positives = reverse_loss_by_hand(*batch, query_contents)
    assert abs(of_queries - of_positives) > 0.1
    symmetric = compute(*batch, query_ids=query_contents, is_symmetric=True)
    np.testing.assert_allclose(symmetric, (of_queries + of_positives) / 2, rtol=1e-4)


@pytest.mark.parametrize("axes", [{"fsdp": 1}, {"slice": 2, "fsdp": 2}], ids=str)
@pytest.mark.parametrize("block_rows", [1, 3, 4])
def test_blocks_of_rows_change_nothing(batch, axes, block_rows, monkeypatch):
    arguments = [jnp.asarray(part) for part in batch]

    def loss_and_gradient(*arguments):
        loss = functools.partial(compute, query_ids=QUERY_CONTENTS, is_symmetric=True)
        return jax.value_and_grad(loss, argnums=(0, 1))(*arguments)

    whole = loss_and_gradient(*arguments)
    monkeypatch.setattr(contrastive, "BLOCK_ROWS", block_rows)
    devices = jax.devices()[: np.prod(list(axes.values()))]
    with jax.set_mesh(make_mesh(**axes, devices=devices)):
        blocked = jax.jit(loss_and_gradient)(*arguments)
    for ours, expected in zip(jax.tree.leaves(blocked), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_memory_does_not_grow_with_the_matrix_of_scores():
    def bytes_needed(count):
        shapes = (
            jax.ShapeDtypeStruct((count, DIMENSION), jnp.float32),
            jax.ShapeDtypeStruct((2 * count, DIMENSION), jnp.float32),
            jax.ShapeDtypeStruct((count,), jnp.int32),
            jax.ShapeDtypeStruct((2 * count,), jnp.int32),
        )
        gradient = jax.grad(lambda q, p, *ids: contrastive_loss(q, p, *ids, 0.1), argnums=(0, 1))
        return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    rows, more_rows = 2048, 8192
    # The block of scores grows with the passages, four-fold; the whole matrix would sixteen-fold.
    assert bytes_needed(more_rows) < 5 * bytes_needed(rows)
