"""Pooling of packed rows: each text has the embedding that it would have alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.data.packing import pack, plan_rows
from grit_jax.objectives.pooling import POOLINGS, normalize, pool, sum_by_text
from grit_jax.text.examples import Text

DIMENSION = 5
ROW_LENGTH = 12
# (instruction and <s>, rest): one text has a single token to pool.
SHAPES = [(1, 4), (3, 1), (2, 6), (1, 2), (5, 7)]
UNUSED = 2


@pytest.fixture(scope="module")
def packed():
    texts = [
        Text(np.arange(1, a + b + 1, dtype=np.int32), np.arange(a + b) >= a) for a, b in SHAPES
    ]
    # A number in the middle and one at the end are left unused.
    numbered = [*texts[:UNUSED], None, *texts[UNUSED:], None]
    used = [number for number, text in enumerate(numbered) if text is not None]
    rows = plan_rows([len(text) for text in texts], ROW_LENGTH)
    rows = [[used[text] for text in row] for row in rows]
    assert max(map(len, rows)) > 1, "rows must hold several texts"
    by_number = {number: numbered[number] for number in used}
    return pack(by_number, rows, len(rows) + 1, ROW_LENGTH, num_texts=len(numbered))


@pytest.fixture(scope="module")
def hidden(packed):
    shape = (*packed.tokens.shape, DIMENSION)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def pool_packed(hidden, packed, pooling):
    return pool(
        jnp.asarray(hidden),
        jnp.asarray(packed.mask),
        jnp.asarray(packed.segment_ids),
        jnp.asarray(packed.positions),
        packed.num_texts,
        pooling,
    )


def pool_alone(states, mask, pooling):
    """Returns the embedding of one text, computed with loops."""
    counted = [state for state, counts in zip(states, mask, strict=True) if counts]
    if pooling == "cls":
        return states[0]
    if pooling == "lasttoken":
        return states[-1]
    weights = [1 if pooling == "mean" else k for k in range(1, len(counted) + 1)]
    total = sum(weight * state for weight, state in zip(weights, counted, strict=True))
    return total / sum(weights)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_text_among_others_is_pooled_as_if_alone(packed, hidden, pooling):
    embeddings = pool_packed(hidden, packed, pooling)
    assert embeddings.shape == (packed.num_texts, DIMENSION)
    assert embeddings.dtype == jnp.float32
    for number, embedding in enumerate(embeddings):
        own = packed.segment_ids == number + 1
        expected = np.zeros(DIMENSION)
        if own.any():
            expected = pool_alone(hidden[own], packed.mask[own], pooling)
        np.testing.assert_allclose(embedding, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_unused_numbers_and_padding_do_not_spoil_the_gradient(packed, hidden, pooling):
    direction = np.random.default_rng(1).normal(size=(packed.num_texts, DIMENSION))

    def score(hidden):
        return jnp.sum(normalize(pool_packed(hidden, packed, pooling)) * direction)

    gradient = jax.grad(score)(jnp.asarray(hidden))
    assert np.isfinite(gradient).all()
    assert not gradient[packed.segment_ids == 0].any()
    for number in np.unique(packed.segment_ids[packed.segment_ids > 0]):
        assert gradient[packed.segment_ids == number].any()


def test_the_instruction_is_not_pooled(packed, hidden):
    is_instruction = (packed.segment_ids > 0) & ~packed.mask
    other = np.where(is_instruction[..., None], 100.0, hidden)
    for pooling in ("mean", "weightedmean"):
        expected = pool_packed(hidden, packed, pooling)
        np.testing.assert_array_equal(pool_packed(other, packed, pooling), expected)


def test_low_precision_states_are_summed_in_float32():
    count = 512
    ids, positions = jnp.ones((1, count), jnp.int32), jnp.arange(count)[None]
    hidden = jnp.full((1, count, 1), 1.0, jnp.bfloat16).at[0, 0].set(3.0)
    embedding = pool(hidden, ids > 0, ids, positions, 1, "mean")
    assert embedding.dtype == jnp.float32
    np.testing.assert_allclose(embedding, [[(count + 2) / count]], rtol=1e-6)


def test_a_text_is_summed_over_rows_too():
    values = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    segment_ids = jnp.array([[1, 2, 0], [2, 2, 4]])
    np.testing.assert_array_equal(sum_by_text(values, segment_ids, 4), [1, 26, 0, 32])


def test_normalized_embeddings_have_length_one_and_zeros_stay():
    embeddings = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-5, 0.0]])
    expected = [[0.6, 0.8], [0, 0], [1, 0]]
    np.testing.assert_allclose(normalize(embeddings), expected, rtol=1e-6)
    gradient = jax.grad(lambda e: jnp.sum(normalize(e)))(embeddings)
    assert np.isfinite(gradient).all()


def test_an_unknown_pooling_names_those_there_are(packed, hidden):
    with pytest.raises(ValueError, match="'max' must be one of mean, weightedmean"):
        pool_packed(hidden, packed, "max")
