"""Compares the joint step with a reference step, and with itself on eight devices."""

import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_batches import SIZES, make_batch, only

from grit_jax.models import ModelConfig, make_config
from grit_jax.objectives.embedding import PATTERNS, EmbeddingSpec
from grit_jax.sharding import batch_shards, make_mesh
from grit_jax.training.joint_loss import LossConfig, make_joint_loss
from grit_jax.training.optimizer import learning_rate_schedule, make_optimizer
from grit_jax.training.train_step import Trainer

OPTIMIZER = {
    "beta1": 0.9,
    "beta2": 0.999,
    "epsilon": 1e-8,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "embedding_lr_multiplier": 2.0,
    "mu_dtype": "float32",
}
LOSS = LossConfig(
    embedding_weight=0.5,
    generative_weight=2.0,
    temperature=0.1,
    generative_reduction="mixed",
    generative_group_size=3,
)


WINDOWS = ("sliding_attention", "full_attention")
MIXTRAL = make_config("mixtral", **SIZES, num_local_experts=4)


@functools.cache  # Many tests run the same program.
def make_trainer(config, mesh, loss=LOSS):
    """Returns a trainer with the optimizer of `hand_adamw`."""
    optimizer = make_optimizer(learning_rate_schedule(0.01, 0.0, 10), **OPTIMIZER)
    return Trainer(config, make_joint_loss(loss), optimizer, mesh)


# The step by hand: one text at a time, without packing, scans, or layer and optimizer libraries.


def norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale


def rotate(heads):
    half = heads.shape[-1] // 2
    angles = np.arange(len(heads))[:, None] * 10000.0 ** (-np.arange(half) / half)
    turn = jnp.exp(1j * angles)[:, None]
    turned = (heads[..., :half] + 1j * heads[..., half:]) * turn
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def hand_attention(p, layer, x, sees):
    query = rotate(jnp.einsum("sd,dnh->snh", x, p["attention"]["query"][layer]))
    key = rotate(jnp.einsum("sd,dkh->skh", x, p["attention"]["key"][layer]))
    value = jnp.einsum("sd,dkh->skh", x, p["attention"]["value"][layer])
    heads = []
    for n in range(SIZES["num_attention_heads"]):
        k = n // (SIZES["num_attention_heads"] // SIZES["num_key_value_heads"])
        scores = query[:, n] @ key[:, k].T / math.sqrt(SIZES["head_dim"])
        scores = jnp.where(sees, scores, -jnp.inf)
        heads.append(jax.nn.softmax(scores) @ value[:, k])
    return jnp.einsum("snh,nhd->sd", jnp.stack(heads, 1), p["attention"]["output"][layer])


@jax.jit
def hand_decoder(parameters, tokens, sees):
    x, layers = parameters["embedding"][tokens], parameters["layers"]
    for layer in range(SIZES["num_hidden_layers"]):
        before = norm(x, layers["attention_norm"]["scale"][layer])
        x = x + hand_attention(layers, layer, before, sees)
        before = norm(x, layers["feed_forward_norm"]["scale"][layer])
        mlp = layers["feed_forward"]
        gate = before @ mlp["gate"][layer]
        gated = gate / (1 + jnp.exp(-gate)) * (before @ mlp["up"][layer])
        x = x + gated @ mlp["down"][layer]
    return norm(x, parameters["norm"]["scale"])


def causal(text):
    return np.tri(len(text)) > 0


# Attention masks of the tokens of a text to embed.
HAND_PATTERNS = {
    "bbcc": lambda text: np.full((len(text), len(text)), True),
    "cbcc": lambda text: causal(text) | text.mask[:, None],
    "cccc": causal,
}


def hand_loss(parameters, texts, attention="bbcc"):
    def embed(text):
        sees = HAND_PATTERNS[attention](text)
        hidden = hand_decoder(parameters, text.tokens, sees)
        if projection := parameters.get("embedding_projection"):
            hidden = hidden @ projection["weight"] + projection["bias"]
        mean = jnp.mean(hidden[text.mask], axis=0)
        return mean / jnp.linalg.norm(mean)

    queries = jnp.stack([embed(text) for text in texts["queries"]])
    passages = jnp.stack([embed(text) for text in texts["passages"]])
    scores = queries @ passages.T / LOSS.temperature
    # Queries 0 and 5 are copies: the positive of one is not a negative of the other.
    scores = scores.at[0, 10].set(-jnp.inf).at[5, 0].set(-jnp.inf)
    own = jnp.array([scores[i, 2 * i] for i in range(8)])
    embedding_loss = jnp.mean(jnp.log(jnp.sum(jnp.exp(scores), axis=1)) - own)

    group_means = []
    for start in range(0, 8, LOSS.generative_group_size):
        losses = []
        for text in texts["chats"][start : start + LOSS.generative_group_size]:
            logits = hand_decoder(parameters, text.tokens, causal(text)) @ parameters["head"]
            probabilities = jnp.exp(logits) / jnp.sum(jnp.exp(logits), axis=1, keepdims=True)
            losses += [
                -jnp.log(probabilities[s - 1, text.tokens[s]])
                for s in range(1, len(text))
                if text.mask[s]
            ]
        group_means.append(sum(losses) / len(losses))
    generative_loss = sum(group_means) / len(group_means)
    loss = LOSS.embedding_weight * embedding_loss + LOSS.generative_weight * generative_loss
    return loss, (embedding_loss, generative_loss)


def hand_adamw(parameters, gradients, moments, step):
    rate = 0.01 * (1 - step / 10)
    norm_of_all = math.sqrt(sum(float(jnp.sum(g**2)) for g in gradients.values()))
    clip = min(1.0, OPTIMIZER["max_grad_norm"] / norm_of_all)
    for name, gradient in gradients.items():
        first, second = moments.get(name, (0.0, 0.0))
        first = 0.9 * first + 0.1 * gradient * clip
        second = 0.999 * second + 0.001 * (gradient * clip) ** 2
        moments[name] = first, second
        update = first / (1 - 0.9 ** (step + 1))
        update /= jnp.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8
        factor = OPTIMIZER["embedding_lr_multiplier"] if name == "['embedding']" else 1.0
        decayed = parameters[name] * OPTIMIZER["weight_decay"]
        parameters[name] = parameters[name] - rate * factor * (update + decayed)
    return norm_of_all


def flat(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.slow
def test_three_joint_steps_equal_three_steps_written_by_hand():
    mesh = make_mesh(devices=jax.devices()[:1])
    config = ModelConfig(**SIZES, embedding_projection_size=12, remat="none")
    trainer = make_trainer(config, mesh)
    state = trainer.initial_state(0)
    start = jax.tree.map(jnp.copy, nnx.to_pure_dict(state.parameters))
    structure = jax.tree.structure(start)
    parameters, moments = flat(start), {}
    gradient_of = jax.value_and_grad(hand_loss, has_aux=True)
    for step in range(3):
        batch, texts = make_batch(seed=step)
        with jax.set_mesh(mesh):
            state, metrics = trainer.step(state, trainer.to_devices(batch))
        tree = jax.tree.unflatten(structure, parameters.values())
        (loss, parts), gradients = gradient_of(tree, texts)
        norm_of_all = hand_adamw(parameters, flat(gradients), moments, step)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["embedding_loss"], parts[0], rtol=1e-5)
        np.testing.assert_allclose(metrics["generative_loss"], parts[1], rtol=1e-5)
        np.testing.assert_allclose(metrics["gradient_norm"], norm_of_all, rtol=1e-4)
    ours = flat(nnx.to_pure_dict(state.parameters))
    assert ours.keys() == parameters.keys()
    for name, expected in parameters.items():
        np.testing.assert_allclose(ours[name], expected, atol=2e-5, err_msg=name)
    assert int(state.step) == 3


@pytest.mark.slow
@pytest.mark.parametrize("attention", sorted(set(PATTERNS) - {LOSS.embedding.attention}))
def test_the_other_patterns_of_attention_equal_those_written_by_hand(attention):
    mesh = make_mesh(devices=jax.devices()[:1])
    loss_config = dataclasses.replace(LOSS, embedding=EmbeddingSpec(attention=attention))
    trainer = make_trainer(ModelConfig(**SIZES), mesh, loss_config)
    state = trainer.initial_state(0)
    batch, texts = make_batch(seed=0)
    parameters = nnx.to_pure_dict(state.parameters)
    loss, (embedding_loss, _) = hand_loss(parameters, texts, attention)
    with jax.set_mesh(mesh):
        _, metrics = trainer.step(state, trainer.to_devices(batch))
    np.testing.assert_allclose(metrics["embedding_loss"], embedding_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


@pytest.mark.slow
def test_logits_of_low_precision_change_only_the_generative_loss():
    batch, _ = make_batch(seed=0)
    mesh = make_mesh(devices=jax.devices()[:1])
    metrics = {}
    for dtype in ("float32", "bfloat16"):
        trainer = make_trainer(ModelConfig(**SIZES, logits_dtype=dtype), mesh)
        state = trainer.initial_state(0)
        logits = trainer.model(state.parameters).logits(jnp.ones((1, 1, SIZES["hidden_size"])))
        assert logits.dtype == dtype
        with jax.set_mesh(mesh):
            _, metrics[dtype] = trainer.step(state, trainer.to_devices(batch))
    exact, rounded = metrics["float32"], metrics["bfloat16"]
    np.testing.assert_allclose(rounded["generative_loss"], exact["generative_loss"], rtol=1e-2)
    assert rounded["generative_loss"] != exact["generative_loss"]
    assert rounded["embedding_loss"] == exact["embedding_loss"]


@pytest.mark.parametrize(
    ("config", "axes"),
    [
        (ModelConfig(**SIZES), {"fsdp": 4, "tensor": 2}),
        (ModelConfig(**SIZES), {"slice": 2, "fsdp": 2, "tensor": 2}),
        (MIXTRAL, {"fsdp": 2, "tensor": 2, "expert": 2}),
        (
            make_config("gemma3", **SIZES, layer_types=WINDOWS, sliding_window=4),
            {"fsdp": 4, "tensor": 2},
        ),
    ],
    ids=["mistral-fsdp-tensor", "mistral-slices", "mixtral-experts", "gemma3"],
)
def test_eight_devices_take_the_step_of_one_device(config, axes):
    results = []
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(**axes)):
        trainer = make_trainer(config, mesh)
        state = trainer.initial_state(0)
        for step in range(2):
            batch, _ = make_batch(seed=step, shards=batch_shards(mesh))
            with jax.set_mesh(mesh):
                state, metrics = trainer.step(state, trainer.to_devices(batch))
        results.append((state.parameters, metrics))
    (one, one_metrics), (eight, eight_metrics) = results
    query = eight["layers"]["attention"]["query"][...]
    assert not query.is_fully_replicated
    assert query.addressable_shards[0].data.size == query.size // (axes["fsdp"] * axes["tensor"])
    for name, value in one_metrics.items():
        np.testing.assert_allclose(eight_metrics[name], value, rtol=2e-5, err_msg=name)
    for name, value in flat(nnx.to_pure_dict(one)).items():
        other = flat(nnx.to_pure_dict(eight))[name]
        np.testing.assert_allclose(other, value, atol=2e-5, err_msg=name)


def test_eight_devices_compute_the_bfloat16_loss_of_one_device():
    config = ModelConfig(**SIZES, dtype="bfloat16")
    losses = []
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(slice=2, fsdp=2, tensor=2)):
        batch, _ = make_batch(seed=0, shards=batch_shards(mesh))
        batch = only(batch, "generative")  # It compiles in half of the time.
        metrics, _, _ = gradient_of(config, LOSS, mesh, batch, 1)
        losses.append([metrics[name] for name in ("loss", "gradient_norm")])
    np.testing.assert_allclose(*losses, rtol=1e-2)


def gradient_of(config, loss_config, mesh, batch, num_chunks):
    """Returns the metrics and the gradient of a step, by SGD with learning rate 1."""
    trainer = Trainer(config, make_joint_loss(loss_config), optax.sgd(1.0), mesh, num_chunks)
    state = trainer.initial_state(0)
    before = jax.tree.map(jnp.copy, state.trained)
    with jax.set_mesh(mesh):
        state, metrics = trainer.step(state, trainer.to_devices(batch))
    return metrics, jax.tree.map(jnp.subtract, before, state.trained), trainer


@pytest.mark.parametrize(
    ("config", "axes"),
    [
        (ModelConfig(**SIZES, embedding_projection_size=12), {"fsdp": 1}),
        (MIXTRAL, {"fsdp": 2, "tensor": 2, "expert": 2}),
    ],
    ids=["mistral-one", "mixtral-eight"],
)
def test_a_batch_in_chunks_has_the_gradient_of_the_whole(config, axes):
    mesh = make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])
    loss_config = dataclasses.replace(LOSS, learn_temperature=True, is_symmetric=True)
    num_chunks = 3
    batch, _ = make_batch(seed=0, shards=batch_shards(mesh) * num_chunks)
    whole, expected, _ = gradient_of(config, loss_config, mesh, batch, 1)
    chunked, gradient, trainer = gradient_of(config, loss_config, mesh, batch, num_chunks)
    assert chunked.keys() == whole.keys()
    assert ("router_loss" in whole) == config.has_experts
    for name in whole:
        np.testing.assert_allclose(chunked[name], whole[name], rtol=1e-5, err_msg=name)
    assert abs(gradient["loss"]["log_temperature"]) > 0.01
    for (path, ours), whole_leaf in zip(
        jax.tree.leaves_with_path(gradient), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(whole_leaf).max()
        assert scale > 0, path
        np.testing.assert_allclose(ours, whole_leaf, atol=2e-5 * scale, err_msg=str(path))
    for leaf, sharding in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(trainer.shardings.trained), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_a_single_kind_of_text_in_chunks():
    batch, _ = make_batch(seed=0, shards=2)
    batch = only(batch, "embedding")
    mesh = make_mesh(devices=jax.devices()[:1])
    config = ModelConfig(**SIZES)
    whole, expected, _ = gradient_of(config, LOSS, mesh, batch, 1)
    chunked, gradient, _ = gradient_of(config, LOSS, mesh, batch, 2)
    assert chunked.keys() == whole.keys()
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(np.abs(theirs).max(), 1e-6))


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    mesh = make_mesh(devices=jax.devices()[:1])
    trainer = make_trainer(ModelConfig(**SIZES), mesh)
    state = trainer.initial_state(0)
    batch, _ = make_batch(seed=0)
    batch = trainer.to_devices(batch)
    parameters = state.parameters
    broken = jax.tree.map(jnp.copy, state.parameters)
    broken["norm"]["scale"][...] = broken["norm"]["scale"][...].at[3].set(jnp.nan)
    with jax.set_mesh(mesh):
        state = dataclasses.replace(state, parameters=broken)
        for count in (1, 2):
            moments = jax.tree.map(np.array, state.optimizer_state.inner_state)
            before = jax.tree.map(np.array, state.parameters)
            state, metrics = trainer.step(state, batch)
            jax.tree.map(np.testing.assert_array_equal, state.parameters, before)
            jax.tree.map(np.testing.assert_array_equal, state.optimizer_state.inner_state, moments)
            assert metrics["steps_skipped"] == metrics["steps_skipped_in_a_row"] == count
        assert int(state.step) == 2
        state = dataclasses.replace(state, parameters=jax.tree.map(jnp.copy, parameters))
        before = jax.tree.map(np.array, state.parameters)
        state, metrics = trainer.step(state, batch)
    assert metrics["steps_skipped"] == 2 and metrics["steps_skipped_in_a_row"] == 0
    assert not np.array_equal(state.parameters["norm"]["scale"][...], before["norm"]["scale"][...])


def test_parameters_in_bfloat16_have_a_second_moment_in_float32():
    mesh = make_mesh(devices=jax.devices()[:1])
    config = ModelConfig(**SIZES, param_dtype="bfloat16")
    optimizer = make_optimizer(
        learning_rate_schedule(0.01, 0.0, 10), **OPTIMIZER | {"mu_dtype": "bfloat16"}
    )
    trainer = Trainer(config, make_joint_loss(LOSS), optimizer, mesh)
    batch, _ = make_batch(seed=0)
    state = trainer.initial_state(0)
    with jax.set_mesh(mesh):
        for _ in range(2):
            state, metrics = trainer.step(state, trainer.to_devices(batch))
    assert np.isfinite(metrics["loss"])
    assert metrics["gradient_norm"].dtype == "float32"
    moments = {name: optax.tree.get(state.optimizer_state, name) for name in ("mu", "nu")}
    for tree, dtype in (
        (state.parameters, "bfloat16"),
        (moments["mu"], "bfloat16"),
        (moments["nu"], "float32"),
    ):
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} == {dtype}


@pytest.mark.parametrize("mode", ["embedding", "generative"])
def test_a_single_kind_of_text_trains_with_the_same_step(mode):
    mesh = make_mesh(devices=jax.devices()[:1])
    trainer = make_trainer(ModelConfig(**SIZES), mesh)
    batch, _ = make_batch(seed=0)
    both = trainer.initial_state(0)
    with jax.set_mesh(mesh):
        _, expected = trainer.step(both, trainer.to_devices(batch))
        alone = trainer.to_devices(only(batch, mode))
        _, metrics = trainer.step(trainer.initial_state(0), alone)
    name = f"{mode}_loss"
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6)
    skipped = {"steps_skipped", "steps_skipped_in_a_row"}
    assert metrics.keys() == {"loss", name, "gradient_norm"} | skipped
    weight = getattr(LOSS, f"{mode}_weight")
    np.testing.assert_allclose(metrics["loss"], weight * metrics[name], rtol=1e-6)
