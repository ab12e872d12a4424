"""Low-rank updates: equality with W + (alpha / rank) A B, and the choice of layers."""

import dataclasses
import functools

from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.models import (
    LoraConfig,
    ModelConfig,
    lora_layers,
    make_config,
    make_model,
    weights_of,
)
from grit_jax.models.weights import linear_layers

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
LORA = LoraConfig(rank=3, alpha=6.0, targets="*")
CONFIGS = [
    ModelConfig(**SIZES, lora=LORA),
    make_config("mixtral", **SIZES, lora=LORA, num_local_experts=4, router_aux_loss_coef=0.5),
]
ATTENTION = ["attention.query", "attention.key", "attention.value", "attention.output"]
FEED_FORWARD = ["feed_forward.gate", "feed_forward.up", "feed_forward.down"]
# L layers, E experts, U rank: A, B -> A B.
PRODUCTS = {
    "query": "LDU,LUNH->LDNH",
    "key": "LDU,LUKH->LDKH",
    "value": "LDU,LUKH->LDKH",
    "output": "LNHU,LUD->LNHD",
    "router": "LDU,LUE->LDE",
}
OF_MLP, OF_EXPERTS = "LIU,LUO->LIO", "LEIU,LEUO->LEIO"


def merge(parameters, scale):
    """Returns the parameters of the plain model: W + (alpha / rank) A B, written out."""
    flat = flatten_dict(parameters)
    merged = {path: array for path, array in flat.items() if path[-1] not in ("a", "b")}
    for path, b in flat.items():
        if path[-1] != "b":
            continue
        a, layer = flat[(*path[:-1], "a")], path[-2].removesuffix("_lora")
        product = PRODUCTS.get(layer, OF_EXPERTS if a.ndim == 4 else OF_MLP)
        merged[(*path[:-2], layer)] += scale * jnp.einsum(product, a, b)
    return unflatten_dict(merged)


def read(config, parameters):
    """Returns a scalar function of the hidden states of some tokens, and the hidden states."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make_model(config, 0)))
    nnx.replace_by_pure_dict(state, parameters)
    tokens = jnp.arange(24).reshape(2, 12) * 7 % SIZES["vocab_size"]
    segments = jnp.ones_like(tokens).at[1, 9:].set(0)
    hidden = nnx.merge(graph, state)(tokens, segment_ids=segments, is_causal=False)
    return jnp.sum(hidden * jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape)), hidden


def initial(config):
    """Returns the initial parameters of a model, by path."""
    with jax.default_prng_impl("rbg"):  # Compiled in a fifth of the time.
        return flatten_dict(jax.jit(lambda: nnx.to_pure_dict(nnx.state(make_model(config, 0))))())


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=["mistral", "mixtral"])
def test_an_adapted_model_is_the_one_with_the_updates_added_to_its_weights(config):
    plain = dataclasses.replace(config, lora=None)
    parameters = initial(config)
    unmade = {path: leaf for path, leaf in parameters.items() if path[-1] == "b"}
    assert len(unmade) == len(linear_layers(weights_of(config)))
    # Before the first step there is no update, and all else is what it is without.
    assert not any(leaf.any() for leaf in unmade.values())
    for path, leaf in initial(plain).items():
        np.testing.assert_array_equal(parameters[path], leaf)

    random = np.random.default_rng(0)
    given = unflatten_dict(
        parameters | {path: 0.2 * random.normal(size=b.shape) for path, b in unmade.items()}
    )

    # The gradient of the second goes through the sum: A's is (alpha / rank) dW B^T by the chain
    # rule, B's (alpha / rank) A^T dW.
    @functools.partial(jax.value_and_grad, has_aux=True)
    def adapted(given):
        return read(config, given)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def merged(given):
        return read(plain, merge(given, LORA.alpha / LORA.rank))

    (_, hidden), gradients = jax.jit(adapted)(given)
    expected = jax.jit(merged)
    (_, expected_hidden), expected_gradients = expected(given)
    np.testing.assert_allclose(hidden, expected_hidden, atol=5e-5)
    ours = flatten_dict(gradients)
    for path, value in flatten_dict(expected_gradients).items():
        largest = np.abs(value).max()
        assert largest > 0 or path == ("head",), path
        np.testing.assert_allclose(ours[path], value, atol=5e-5 * largest, err_msg=str(path))
    (_, without), _ = expected(unflatten_dict(parameters))
    assert np.abs(hidden - without).max() > 0.1


def test_the_update_is_not_rounded_as_the_weight_is():
    config = ModelConfig(**SIZES, lora=LORA, param_dtype="bfloat16", dtype="float32")
    state = nnx.state(nnx.eval_shape(lambda: make_model(config, 0)))
    for path, leaf in flatten_dict(nnx.to_pure_dict(state)).items():
        assert leaf.dtype == ("float32" if path[-1] in ("a", "b") else "bfloat16"), path


@pytest.mark.parametrize("config", CONFIGS, ids=["mistral", "mixtral"])
def test_the_layers_that_can_be_adapted_are_all_matrices_of_a_decoder_layer(config):
    plain = dataclasses.replace(config, lora=None)
    layers = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: make_model(plain, 0))))["layers"]
    matrices = {".".join(path) for path, leaf in flatten_dict(layers).items() if leaf.ndim > 2}
    assert matrices == set(linear_layers(weights_of(config)))


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        ("*", [*ATTENTION, "feed_forward.router", *FEED_FORWARD]),
        ("attention.*", ATTENTION),
        ("feed_forward.up, attention.[qv]*", [ATTENTION[0], ATTENTION[2], "feed_forward.up"]),
        ("*.output,attention.output", ["attention.output"]),
    ],
)
def test_patterns_choose_layers(targets, chosen):
    lora = LoraConfig(rank=1, alpha=1.0, targets=targets)
    config = make_config("mixtral", **SIZES, num_local_experts=4, lora=lora)
    assert lora_layers(config) == chosen
    layers = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: make_model(config, 0))))["layers"]
    adapted = {
        f"{path[0]}.{path[1].removesuffix('_lora')}"
        for path in flatten_dict(layers)
        if path[-1] == "a"
    }
    assert adapted == set(chosen)


@pytest.mark.parametrize("targets", ["attention.qery", "attention.*,mlp.*", "", "query"])
def test_a_pattern_that_matches_nothing_names_the_layers_that_there_are(targets):
    with pytest.raises(ValueError, match="matches no linear layer") as error:
        make_config("mistral", **SIZES, lora=LoraConfig(rank=1, alpha=1.0, targets=targets))
    assert ", ".join([*ATTENTION, *FEED_FORWARD]) in str(error.value)
    assert targets.split(",")[-1] in str(error.value)
