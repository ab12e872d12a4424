"""The losses against plain NumPy, one text at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.data.examples import Text
from grit_jax.data.packing import pack, plan_rows
from grit_jax.objectives.contrastive import contrastive_loss
from grit_jax.objectives.next_token import next_token_loss, shift_targets, target_weights
from grit_jax.objectives.pooling import POOLINGS, normalize, pool
from grit_jax.objectives.router import load_balancing_loss


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def packed_texts(generator, lengths, unpooled=2, unused=1):
    texts = [
        Text(generator.integers(1, 30, n).astype(np.int32), np.arange(n) >= unpooled)
        for n in lengths
    ]
    rows = plan_rows(lengths, 16)
    return texts, pack([*texts, *[None] * unused], rows, len(rows) + 1, 16)


WEIGHTS = {
    "mean": lambda n: [0, 0, *[1] * (n - 2)],
    "weightedmean": lambda n: [0, 0, *range(1, n - 1)],
    "lasttoken": lambda n: [*[0] * (n - 1), 1],
    "cls": lambda n: [1, *[0] * (n - 1)],
}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_of_packed_rows_is_that_of_each_text_alone(generator, pooling):
    texts, packed = packed_texts(generator, [5, 9, 3, 7, 12])
    hidden = generator.normal(size=(*packed.tokens.shape, 4)).astype(np.float32)

    def embed(hidden):
        return pool(
            hidden, packed.mask, packed.segment_ids, packed.positions, packed.num_texts, pooling
        )

    embeddings = embed(hidden)
    for number, text in enumerate(texts):
        own = hidden[packed.segment_ids == number + 1]
        expected = np.average(own, axis=0, weights=WEIGHTS[pooling](len(text)))
        np.testing.assert_allclose(embeddings[number], expected, rtol=1e-5, atol=1e-6)
    assert not np.any(embeddings[-1])  # The number that no text bears.
    gradient = jax.grad(lambda hidden: jnp.sum(normalize(embed(hidden))[:, 0]))(hidden)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[packed.segment_ids == 0])


def test_an_unknown_pooling_is_named(generator):
    _, packed = packed_texts(generator, [5])
    with pytest.raises(ValueError, match="'max' must be one of mean"):
        pool(np.ones((2, 16, 1)), packed.mask, packed.segment_ids, packed.positions, 2, "max")


def test_contrastive_loss_ignores_copies_of_the_positive_and_unused_places(generator):
    queries, passages = generator.normal(size=(3, 5)), generator.normal(size=(7, 5))
    passages[6] = 0
    contents = np.array([0, 1, 2, 0, 4, 5, -1])  # 3 is a copy of 0; 6 holds nothing.
    positives = np.array([0, 2, 4])
    candidates = [[0, 1, 2, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    expected = 0.0
    for query, positive, allowed in zip(queries, positives, candidates, strict=True):
        scores = np.exp([query @ passages[number] / 0.5 for number in allowed])
        expected -= np.log(scores[allowed.index(positive)] / scores.sum()) / 3
    arguments = (jnp.asarray(queries, jnp.float32), jnp.asarray(passages, jnp.float32))
    loss, gradients = jax.value_and_grad(contrastive_loss, (0, 1))(
        *arguments, positives, contents, 0.5
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)
    assert not np.any(gradients[1][6])


def test_targets_never_cross_from_one_text_to_the_next(generator):
    texts, packed = packed_texts(generator, [5, 9, 3, 7, 12], unpooled=0)
    targets, is_target = shift_targets(packed.tokens, packed.segment_ids, packed.mask)
    for number, text in enumerate(texts):
        own = packed.segment_ids == number + 1
        np.testing.assert_array_equal(is_target[own], [True] * (len(text) - 1) + [False])
        np.testing.assert_array_equal(targets[own][:-1], text.tokens[1:])
    assert not np.any(is_target[packed.segment_ids == 0])


def test_weights_of_the_three_reductions(generator):
    _, packed = packed_texts(generator, [5, 9, 3, 7, 12])
    _, is_target = shift_targets(packed.tokens, packed.segment_ids, packed.mask)
    counts = np.array([3, 7, 1, 5, 10, 0])  # The last number is unused.

    def weights(reduction):
        return np.asarray(target_weights(reduction, is_target, packed.segment_ids, 6, 4))

    np.testing.assert_allclose(weights("mean")[is_target], 1 / counts.sum(), rtol=1e-6)
    np.testing.assert_allclose(weights("token")[is_target], 1 / 6, rtol=1e-6)
    groups = np.where(packed.segment_ids[is_target] <= 4, counts[:4].sum(), counts[4:].sum())
    np.testing.assert_allclose(weights("mixed")[is_target], 1 / (2 * groups), rtol=1e-6)
    for reduction in ("mean", "token", "mixed"):
        assert not np.any(weights(reduction)[~np.asarray(is_target)])
    with pytest.raises(ValueError, match="'sum' must be one of"):
        weights("sum")


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 16, 100])
def test_cross_entropy_in_chunks_is_that_of_whole_logits(generator, chunk_size):
    hidden = jnp.asarray(generator.normal(size=(3, 16, 6)), jnp.float32)
    projection = jnp.asarray(generator.normal(size=(6, 11)), jnp.float32)
    targets = generator.integers(0, 11, (3, 16))
    weights = jnp.asarray(generator.random((3, 16)), jnp.float32)

    def whole(hidden, projection):
        probabilities = jax.nn.softmax(hidden @ projection)
        own = jnp.take_along_axis(probabilities, targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(weights * jnp.log(own))

    def chunked(hidden, projection):
        return next_token_loss(hidden, projection, targets, weights, chunk_size)

    expected, expected_gradients = jax.value_and_grad(whole, (0, 1))(hidden, projection)
    loss, gradients = jax.value_and_grad(chunked, (0, 1))(hidden, projection)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-4, atol=1e-5)


def test_router_loss_is_the_number_of_choices_at_perfect_balance():
    balanced = load_balancing_loss(
        np.full((3, 2, 4), 25.0), np.full((3, 4), 25.0), np.full(3, 100.0)
    )
    np.testing.assert_allclose(balanced, 2.0, rtol=1e-6)
    one_sided = np.zeros((1, 2, 4))
    one_sided[:, 0, 0] = one_sided[:, 1, 1] = 100
    probabilities = np.array([[70.0, 30.0, 0.0, 0.0]])
    skewed = load_balancing_loss(one_sided, probabilities, np.array([100.0]))
    np.testing.assert_allclose(skewed, 4 * (1 * 0.7 + 1 * 0.3), rtol=1e-6)
