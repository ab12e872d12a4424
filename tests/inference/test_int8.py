"""Linear layers in int8: quantized per output, the same on any mesh, close to the original."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_values

from grit_jax.models.linear import round_to_int8
from grit_jax.sharding import make_mesh

TEXTS = [[5, 6, 7], list(range(3, 60)), [9, 9]]


@pytest.mark.parametrize("num_inputs", [1, 2])
def test_each_output_is_rounded_by_its_own_largest_weight(num_inputs):
    matrix = np.random.default_rng(0).normal(size=(6, 5, 4)) * [1, 10, 1e-3, 0]
    rounded, scale = round_to_int8(matrix, num_inputs)
    assert rounded.dtype == np.int8
    assert scale.shape == ((1, 5, 4) if num_inputs == 1 else (1, 1, 4))
    assert (np.abs(rounded * scale - matrix) <= scale / 2 * (1 + 1e-6)).all()
    largest = np.abs(rounded).max(axis=tuple(range(num_inputs)))
    assert (largest[..., :3] == 127).all()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mistral", "mixtral"])
def test_embeddings_stay_close_and_are_alike_on_a_mesh(reference_model, architecture):
    exact = reference_model(architecture).encode(TEXTS)
    model = reference_model(architecture, linear_dtype="int8")
    layers = model.model.layers
    assert layers.attention.query[...].dtype == layers.feed_forward.down[...].dtype == jnp.int8
    if architecture == "mixtral":
        assert layers.feed_forward.router[...].dtype == jnp.float32
        assert layers.feed_forward.gate_scale[...].shape == (3, 4, 1, 80)
    embeddings = model.encode(TEXTS)
    assert np.sum(embeddings * exact, axis=1).min() > 0.995
    assert np.abs(embeddings - exact).max() > 1e-4
    mesh = make_mesh(fsdp=2, tensor=2, expert=2)
    folder = reference_values.FOLDER / f"tiny-{architecture}"
    split = type(model).from_pretrained(folder, dtype="float32", linear_dtype="int8", mesh=mesh)
    assert isinstance(split.model.layers.attention.query[...], jax.Array)
    np.testing.assert_allclose(split.encode(TEXTS), embeddings, atol=1e-5)


def test_the_weights_are_those_that_were_rounded(reference_model):
    exact, model = reference_model(), reference_model(linear_dtype="int8")
    for layer in ("query", "output"):
        whole = np.asarray(getattr(exact.model.layers.attention, layer)[...])
        num_inputs = 2 if layer == "output" else 1
        rounded = [round_to_int8(matrix, num_inputs) for matrix in whole]
        found = getattr(model.model.layers.attention, layer)[...]
        np.testing.assert_array_equal(found, np.stack([matrix for matrix, _ in rounded]))
        scale = getattr(model.model.layers.attention, f"{layer}_scale")[...]
        np.testing.assert_array_equal(scale, np.stack([scale for _, scale in rounded]))


def test_text_is_generated(reference_model):
    model = reference_model(linear_dtype="int8")
    ids = model.generate([5, 6, 7], 5)
    logits = model.model.logits(model.model(jnp.array([[5, 6, 7, *ids]])))[0]
    np.testing.assert_array_equal(ids, jnp.argmax(logits[2 : 2 + len(ids)], axis=-1))


def test_another_type_is_an_error(reference_model):
    with pytest.raises(ValueError, match="linear_dtype='int4' must be one of None, int8"):
        reference_model(linear_dtype="int4")
