"""What every registered architecture can do: a new record is tested by being registered."""

from flax import nnx
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_batches import SIZES, make_batch

from grit_jax.conversion import open_model
from grit_jax.inference.loading import load_module
from grit_jax.models import (
    ARCHITECTURES,
    LoraConfig,
    config_to_hugging_face,
    lora_layers,
    make_config,
    make_model,
    weights_of,
)
from grit_jax.models.config import FULL, SLIDING
from grit_jax.models.weights import linear_layers
from grit_jax.sharding import batch_shards, make_mesh
from grit_jax.training.joint_loss import LossConfig, make_joint_loss
from grit_jax.training.train_step import Trainer

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
TOKENS = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, 12))


def small_config(architecture, **settings):
    sizes = ARCHITECTURES[architecture].sizes
    fields = {name: size for name, size in EXPERTS.items() if name in sizes}
    if sizes.get("layer_types") is not None:
        fields |= {"layer_types": (SLIDING, FULL), "sliding_window": 4}
    return make_config(architecture, **(SIZES | fields | settings))


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def theirs(architecture):
    """A random model of transformers, from a config.json that we write."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    fields = config_to_hugging_face(small_config(architecture, initializer_range=0.2))
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return AutoModelForCausalLM.from_config(config).float()


def test_operations_are_counted(architecture, theirs):
    """Two for each weight of the layers' matrices that a token passes through."""
    config = small_config(architecture)
    weights = 0
    for name, parameter in theirs.named_parameters():
        if ".layers." in name and parameter.ndim > 1:  # Transformers stacks experts.
            share = 1 if parameter.ndim == 2 else EXPERTS["num_experts_per_tok"] / len(parameter)
            weights += parameter.numel() * share
    counted = ARCHITECTURES[architecture].matmul_flops_per_token(config)
    assert counted == 2 * weights


def test_int8_is_close_to_float32(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    stored = open_model(tmp_path)

    def embeddings(linear_dtype):
        model = load_module(stored, "float32", one_device(), linear_dtype)
        means = nnx.jit(lambda model: model(TOKENS, is_causal=False).mean(1))(model)
        return means / jnp.linalg.norm(means, axis=1, keepdims=True)

    exact, rounded = embeddings(None), embeddings("int8")
    assert jnp.sum(exact * rounded, axis=1).min() > 0.99
    assert jnp.abs(exact - rounded).max() > 1e-5


@pytest.mark.slow
def test_gradients_of_low_rank_updates(architecture):
    """With W + s A B for W, those of A and B are s dW B^T and s A^T dW."""
    lora = LoraConfig(rank=2, alpha=3.0, targets="*")
    config = small_config(architecture, lora=lora)
    graph, state = nnx.split(make_model(config, 0))
    generator = np.random.default_rng(0)
    state = jax.tree.map(  # B starts at 0.
        lambda leaf: leaf + 0.1 * generator.normal(size=leaf.shape).astype(np.float32), state
    )

    @jax.jit
    @jax.grad
    def gradient(state):
        model = nnx.merge(graph, state)
        return jnp.sum(jnp.cos(model(TOKENS, is_causal=False)))

    state, found = (flatten_dict(nnx.to_pure_dict(tree)) for tree in (state, gradient(state)))
    specs = linear_layers(weights_of(config))
    for layer in lora_layers(config):
        module, name = layer.split(".")
        path, update = ("layers", module, name), ("layers", module, f"{name}_lora")
        num_stack_axes = 1 + specs[layer].num_stack_axes
        middle = num_stack_axes + specs[layer].num_inputs

        def flat(matrix, num_stack_axes=num_stack_axes, middle=middle):
            """[layers and experts, inputs, outputs]."""
            shape = matrix.shape
            split = (shape[:num_stack_axes], shape[num_stack_axes:middle], shape[middle:])
            return np.asarray(matrix).reshape([int(np.prod(axes)) for axes in split])

        of_w, a = flat(found[path]), flat(state[*update, "a"])
        b = np.asarray(state[*update, "b"]).reshape(len(of_w), -1, of_w.shape[2])
        scale = lora.alpha / lora.rank
        expected = {
            "a": scale * of_w @ b.swapaxes(1, 2),
            "b": scale * a.swapaxes(1, 2) @ of_w,
        }
        for matrix, value in expected.items():
            ours = np.asarray(found[*update, matrix]).reshape(value.shape)
            largest = np.abs(value).max()
            assert largest > 0, layer
            np.testing.assert_allclose(ours, value, atol=1e-4 * largest, err_msg=layer)


@pytest.mark.slow
def test_eight_devices_in_chunks_have_the_gradient_of_one_device(architecture):
    config = small_config(architecture)
    fsdp, expert = (2, 2) if config.has_experts else (4, 1)
    loss = make_joint_loss(
        LossConfig(
            embedding_weight=0.5,
            generative_weight=2.0,
            temperature=0.1,
            generative_reduction="mixed",
            generative_group_size=3,
        )
    )
    mesh = make_mesh(fsdp=fsdp, expert=expert, tensor=2)
    batch, _ = make_batch(seed=0, shards=2 * batch_shards(mesh))
    results = []
    for devices, num_chunks in ((one_device(), 1), (mesh, 2)):
        trainer = Trainer(config, loss, optax.sgd(1.0), devices, num_chunks)
        state = trainer.initial_state(0)
        before = jax.tree.map(np.asarray, state.trained)
        with jax.set_mesh(devices):
            state, metrics = trainer.step(state, trainer.to_devices(batch))
        gradient = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.trained)
        results.append((metrics, dict(jax.tree.leaves_with_path(gradient))))
    (one_metrics, one), (metrics, eight) = results
    query = state.parameters["layers"]["attention"]["query"][...]
    assert query.addressable_shards[0].data.size == query.size // (fsdp * 2)
    assert ("router_loss" in metrics) == config.has_experts
    assert metrics.keys() == one_metrics.keys()
    for name, value in one_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    for path, expected in one.items():
        largest = np.abs(expected).max()
        assert largest > 0, path
        np.testing.assert_allclose(eight[path], expected, atol=1e-4 * largest, err_msg=str(path))
