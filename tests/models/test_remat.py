"""Policies of rematerialisation: the same gradients, in less and less memory."""

import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.models import ModelConfig, make_config, make_model
from grit_jax.models.remat import HOST_MEMORY, REMAT_POLICIES
from grit_jax.sharding import MeshError, make_mesh
from grit_jax.training.train_step import check_model_fits_mesh

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def compile_gradient(config):
    """Returns the compiled gradient of a loss on eight rows, and the parameters it is taken at."""
    graph, parameters = nnx.split(make_model(config, seed=0))
    tokens = jax.random.randint(jax.random.key(1), (8, 64), 0, SIZES["vocab_size"])

    def loss(parameters, tokens):
        return jnp.sum(nnx.merge(graph, parameters)(tokens)[..., 0])

    return jax.jit(jax.grad(loss)).lower(parameters, tokens).compile(), (parameters, tokens)


def assert_equal(ours, expected):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mistral", "mixtral"])
def test_policies_change_memory_and_not_the_gradient(architecture):
    memory, gradients = {}, {}
    for remat in REMAT_POLICIES:
        compiled, arguments = compile_gradient(make_config(architecture, **SIZES, remat=remat))
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        gradients[remat] = compiled(*arguments)
    assert memory["none"] > 1.1 * memory["save_matmuls"]
    assert memory["save_matmuls"] > 1.1 * memory["full"]
    for gradient in gradients.values():
        assert_equal(gradient, gradients["none"])


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["save_matmuls", "offload"])
def test_policies_reach_into_experts_on_a_mesh(remat):
    gradients = []
    for config in (make_config("mixtral", **SIZES, remat=remat), make_config("mixtral", **SIZES, remat="none")):
        with jax.set_mesh(make_mesh(fsdp=2, tensor=2, expert=2)):
            compiled, arguments = compile_gradient(config)
            gradients.append(compiled(*arguments))
    assert_equal(*gradients)


def test_offloading_moves_the_products_to_the_host():
    graph, parameters = nnx.split(make_model(make_config("mixtral", **SIZES, remat="offload"), seed=0))
    tokens = jnp.zeros((1, 64), jnp.int32)

    def loss(parameters):
        return jnp.sum(nnx.merge(graph, parameters)(tokens))

    program = jax.jit(jax.grad(loss)).trace(parameters).lower(lowering_platforms=("tpu",))
    assert HOST_MEMORY in program.as_text()


def mesh_of(*devices):
    """A mesh of devices, each given by the memories that it tells of."""
    devices = [
        types.SimpleNamespace(
            platform="abacus",
            addressable_memories=lambda kinds=kinds: [
                types.SimpleNamespace(kind=kind) for kind in kinds
            ],
        )
        for kinds in devices
    ]
    return types.SimpleNamespace(devices=np.array(devices), shape=make_mesh().shape)


def test_offloading_needs_a_memory_to_offload_to():
    mesh = mesh_of(["device"])
    check_model_fits_mesh(ModelConfig(**SIZES, remat="save_matmuls"), mesh)
    with pytest.raises(MeshError, match=r"config\.model\.remat='offload'.*abacus"):
        check_model_fits_mesh(ModelConfig(**SIZES, remat="offload"), mesh)


def test_offloading_asks_the_devices_of_this_process():
    # TPUs of other processes, which may come first, tell of no memory.
    mesh = mesh_of([], ["device", HOST_MEMORY])
    check_model_fits_mesh(ModelConfig(**SIZES, remat="offload"), mesh)
