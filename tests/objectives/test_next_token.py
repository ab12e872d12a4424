"""The next-token loss against loops over tokens, and its reductions computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.objectives.next_token import (
    REDUCTIONS,
    next_token_loss,
    shift_targets,
    target_weights,
)

ROWS, LENGTH, DIMENSION, VOCABULARY = 3, 10, 4, 11


@pytest.fixture(scope="module")
def arrays():
    random = np.random.default_rng(0)
    hidden = random.normal(size=(ROWS, LENGTH, DIMENSION)).astype(np.float32)
    projection = random.normal(size=(DIMENSION, VOCABULARY)).astype(np.float32)
    targets = random.integers(0, VOCABULARY, (ROWS, LENGTH))
    weights = random.random((ROWS, LENGTH)).astype(np.float32)
    weights[random.random((ROWS, LENGTH)) < 0.4] = 0
    return hidden, projection, targets, weights


def loss_by_hand(hidden, projection, targets, weights):
    total = 0.0
    for row in range(ROWS):
        for position in range(LENGTH):
            logits = hidden[row, position].astype(np.float64) @ projection
            log_probability = logits[targets[row, position]] - np.log(np.sum(np.exp(logits)))
            total -= weights[row, position] * log_probability
    return total


def loss_at_once(hidden, projection, targets, weights):
    log_probabilities = jax.nn.log_softmax(hidden @ projection)
    own = jnp.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0]
    return -jnp.sum(own * weights)


# Chunks that divide the length, that do not, that are as long, and that are longer.
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 7, 10, 256])
def test_chunks_of_any_size_give_the_loss_and_gradient_of_the_whole(arrays, chunk_size):
    arrays = [jnp.asarray(array) for array in arrays]

    def chunked(*arrays):
        return next_token_loss(*arrays, chunk_size=chunk_size)

    loss, gradient = jax.value_and_grad(chunked, argnums=(0, 1))(*arrays)
    np.testing.assert_allclose(loss, loss_by_hand(*map(np.asarray, arrays)), rtol=1e-5)
    expected = jax.grad(loss_at_once, argnums=(0, 1))(*arrays)
    for ours, theirs in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_logits_of_low_precision_round_before_the_logarithm(arrays):
    hidden, projection, targets, weights = map(jnp.asarray, arrays)
    loss = next_token_loss(hidden, projection, targets, weights, logits_dtype="bfloat16")
    logits = (hidden @ projection).astype(jnp.bfloat16).astype(jnp.float32)
    expected = loss_at_once(logits, jnp.eye(VOCABULARY), targets, weights)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_low_precision_states_give_a_loss_in_float32(arrays):
    hidden, projection, targets, weights = map(jnp.asarray, arrays)
    hidden = hidden.astype(jnp.bfloat16)
    loss = next_token_loss(hidden, projection, targets, weights, chunk_size=3)
    assert loss.dtype == jnp.float32
    rounded = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in (hidden, projection)]
    np.testing.assert_allclose(loss, loss_at_once(*rounded, targets, weights), rtol=1e-5)


def test_no_text_is_asked_for_the_first_token_of_the_next():
    tokens = jnp.array([[11, 12, 13, 21, 22, 0], [31, 32, 41, 42, 43, 44]])
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 0], [3, 3, 4, 4, 4, 4]])
    # Even where all of a text is to be learned, its first token has nothing before it.
    targets, is_target = shift_targets(tokens, segment_ids, segment_ids > 0)
    expected = [[1, 1, 0, 1, 0, 0], [1, 0, 1, 1, 1, 0]]
    np.testing.assert_array_equal(is_target, np.array(expected, bool))
    np.testing.assert_array_equal(targets[is_target], [12, 13, 22, 32, 42, 43, 44])


def test_only_tokens_of_the_mask_are_targets():
    tokens = jnp.array([[1, 5, 6, 7, 2, 0]])
    segment_ids = jnp.array([[1, 1, 1, 1, 1, 0]])
    mask = jnp.array([[0, 0, 1, 0, 1, 0]], bool)
    targets, is_target = shift_targets(tokens, segment_ids, mask)
    np.testing.assert_array_equal(is_target, np.array([[0, 1, 0, 1, 0, 0]], bool))
    np.testing.assert_array_equal(targets[is_target], [6, 2])


# Five chats: their numbers of targets are 3, 1, 0, 2 and 4; two rows; padding.
SEGMENT_IDS = np.array([[2, 2, 1, 1, 1, 1, 3, 0], [5, 5, 5, 5, 5, 4, 4, 4]])
IS_TARGET = np.array([[1, 0, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 1, 1, 0]], bool)
TARGETS_OF_TEXTS = [3, 1, 0, 2, 4]


def weight_of_texts(reduction, group_size=2):
    """Returns the weight of a target of each text, computed by hand."""
    if reduction == "token":
        return [1 / 5] * 5
    if reduction == "mean":
        return [1 / 10] * 5
    groups = [list(range(start, min(start + group_size, 5))) for start in range(0, 5, group_size)]
    weights = [0.0] * 5
    for group in groups:
        for text in group:
            weights[text] = 1 / sum(TARGETS_OF_TEXTS[own] for own in group) / len(groups)
    return weights


def compute_weights(reduction, group_size=2, num_texts=5):
    return target_weights(
        reduction, jnp.asarray(IS_TARGET), jnp.asarray(SEGMENT_IDS), num_texts, group_size
    )


def assert_weights(weights, of_texts):
    expected = np.where(IS_TARGET, np.array([0, *of_texts])[SEGMENT_IDS], 0)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_by_hand(reduction):
    # "mixed": groups of texts {0, 1}, {2, 3}, {4} with 4, 2 and 4 targets.
    assert weight_of_texts("mixed") == [1 / 12, 1 / 12, 1 / 6, 1 / 6, 1 / 12]
    assert_weights(compute_weights(reduction), weight_of_texts(reduction))


@pytest.mark.parametrize("group_size", [3, 4, 5, 32])
def test_mixed_groups_of_any_size(group_size):
    weights = compute_weights("mixed", group_size)
    assert_weights(weights, weight_of_texts("mixed", group_size))
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)


def test_one_group_of_all_texts_is_the_mean():
    np.testing.assert_allclose(compute_weights("mixed", 5), compute_weights("mean"), rtol=1e-6)


def test_the_loss_of_a_text_does_not_depend_on_the_row_it_lies_in():
    swapped = target_weights(
        "mixed", jnp.asarray(IS_TARGET[::-1]), jnp.asarray(SEGMENT_IDS[::-1]), 5, 2
    )
    np.testing.assert_array_equal(swapped[::-1], compute_weights("mixed"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_without_targets_weighs_nothing(reduction):
    none = jnp.zeros_like(jnp.asarray(IS_TARGET))
    weights = target_weights(reduction, none, jnp.asarray(SEGMENT_IDS), 5, 2)
    assert not weights.any()
    assert np.isfinite(weights).all()


def test_an_unknown_reduction_names_those_there_are():
    with pytest.raises(ValueError, match="'sum' must be one of mixed, token, mean"):
        compute_weights("sum")
