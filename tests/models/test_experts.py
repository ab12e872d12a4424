"""Experts against a plain loop over them, on one device and on meshes of eight devices."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.models import grouped_matmul as grouped_matmul_module
from grit_jax.models import make_config, weights_of
from grit_jax.models.experts import (
    EXPERT_DOWN_AXES,
    EXPERT_UP_AXES,
    Experts,
    apply_experts,
    ragged_all_to_all_on_cpu,
)
from grit_jax.models.grouped_matmul import grouped_matmul
from grit_jax.sharding import make_mesh, mesh_axes, partition_spec

D, F, E, C = 16, 24, 8, 2
SIZES = {
    "vocab_size": 32,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MESHES = [
    {"fsdp": 1, "expert": 8},
    {"fsdp": 2, "expert": 4},
    {"fsdp": 1, "tensor": 2, "expert": 4},
    {"fsdp": 2, "tensor": 2, "expert": 2},
    {"slice": 2, "fsdp": 1, "tensor": 2, "expert": 2},
    {"fsdp": 4, "tensor": 2},
]


def loop_over_experts(tokens, weights, experts, gate, up, down):
    output = jnp.zeros_like(tokens)
    for expert in range(E):
        x = tokens @ gate[expert]
        transformed = (x / (1 + jnp.exp(-x)) * (tokens @ up[expert])) @ down[expert]
        share = jnp.sum(jnp.where(experts == expert, weights, 0), axis=1, keepdims=True)
        output += share * transformed
    return output


def apply_unadapted(tokens, weights, experts, *matrices):
    return apply_experts(tokens, weights, experts, *((matrix,) for matrix in matrices))


def make_inputs(num_tokens, experts, seed=0):
    random = np.random.default_rng(seed)
    shapes = [(num_tokens, D), (E, D, F), (E, D, F), (E, F, D)]
    tokens, gate, up, down = (random.normal(size=s).astype(np.float32) for s in shapes)
    weights = random.dirichlet(np.ones(C), num_tokens).astype(np.float32)
    return tokens, weights, experts, gate, up, down


def routings(num_tokens):
    random = np.random.default_rng(1)
    even = np.argsort(random.random((num_tokens, E)), axis=1)[:, :C]
    return {
        "even": even,
        "all tokens choose the same two": np.broadcast_to([5, 2], (num_tokens, C)),
        "experts 0, 1, 5, 6 and 7 are not chosen": 2 + even % 3,
        "padding": np.where(random.random((num_tokens, 1)) < 0.4, E, even),
    }


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_gradients(function, tokens, weights, experts, *into_and_out_of):
    direction = jnp.cos(jnp.arange(tokens.size)).reshape(tokens.shape)

    def loss(tokens, weights, *into_and_out_of):
        output = function(tokens, weights, experts, *into_and_out_of)
        return jnp.sum(output * direction), output

    compute = jax.value_and_grad(loss, argnums=range(5), has_aux=True)
    (_, output), gradients = compute(tokens, weights, *into_and_out_of)
    names = ("output", "tokens", "weights", "gate", "up", "down")
    return dict(zip(names, (output, *gradients), strict=True))


def assert_is_the_loop(inputs, placed, routing):
    expected = outputs_and_gradients(loop_over_experts, *inputs)
    ours = outputs_and_gradients(apply_unadapted, *placed)
    for name, value in expected.items():
        np.testing.assert_allclose(
            ours[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=f"{routing} {name}"
        )


@pytest.mark.parametrize("num_tokens", [1, 40, 333])
def test_one_device_does_what_a_loop_over_the_experts_does(num_tokens):
    for routing, experts in routings(num_tokens).items():
        inputs = make_inputs(num_tokens, experts)
        assert_is_the_loop(inputs, inputs, routing)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_eight_devices_do_what_a_loop_over_the_experts_does(axes):
    mesh = make_mesh(**axes)
    batch, into = partition_spec("batch", None), partition_spec(*EXPERT_UP_AXES)
    specs = (batch, batch, batch, into, into, partition_spec(*EXPERT_DOWN_AXES))
    shardings = [jax.NamedSharding(mesh, spec) for spec in specs]
    for routing, experts in routings(48).items():
        inputs = make_inputs(48, experts)
        with jax.set_mesh(mesh):
            assert_is_the_loop(inputs, jax.device_put(inputs, tuple(shardings)), routing)


def test_a_mixtral_gives_padding_no_experts_work():
    config = make_config("mixtral", **SIZES)
    experts = Experts(config, weights_of(config), "layers.feed_forward", rngs=nnx.Rngs(0))
    transform = jax.jit(lambda hidden, is_token: experts(hidden, is_token)[0])
    hidden = jax.random.normal(jax.random.key(0), (6, D))
    is_token = jnp.array([True, True, False, True, False, True])
    padded = transform(hidden, is_token)
    alone = transform(hidden[is_token], jnp.ones(4, bool))
    np.testing.assert_allclose(padded[is_token], alone, rtol=1e-5)
    assert not padded[~is_token].any()


def test_the_work_does_not_grow_with_the_number_of_experts():
    def flops(num_experts):
        shapes = [(256, 64), (num_experts, 64, 128), (num_experts,)]
        arguments = [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in zip(shapes, (jnp.float32, jnp.float32, jnp.int32), strict=True)
        ]
        return jax.jit(grouped_matmul).lower(*arguments).compile().cost_analysis()["flops"]

    assert flops(32) < 1.1 * flops(4)


def test_tpus_get_their_own_kernels():
    """A CPU cannot run them, but it can lower the program for a TPU."""
    mesh = make_mesh(fsdp=2, expert=4)
    inputs = make_inputs(48, routings(48)["even"])

    def program(function):
        with jax.set_mesh(mesh):
            traced = jax.jit(function).trace(*inputs)
        return traced.lower(lowering_platforms=("tpu",)).as_text()

    outputs = program(apply_unadapted)
    assert "ragged_all_to_all" in outputs and "chlo.ragged_dot" in outputs
    assert "stablehlo.while" not in outputs, "the loop over blocks is for other platforms"
    gradients = program(functools.partial(outputs_and_gradients, apply_unadapted))
    assert "tpu_custom_call" in gradients, "megablox, for the gradients of the weights"


@pytest.mark.parametrize("num_rows", [128, 300, 640])
def test_the_gradients_on_tpus_are_those_elsewhere(monkeypatch, num_rows):
    interpreted = functools.partial(grouped_matmul_module.tgmm, interpret=True)
    monkeypatch.setattr(grouped_matmul_module, "tgmm", interpreted)
    random = np.random.default_rng(num_rows)
    sizes = jnp.array([num_rows // 3, 0, num_rows // 2, 1, 0], jnp.int32)  # Some rows are left.
    rows, gradient = random.normal(size=(num_rows, 24)), random.normal(size=(num_rows, 40))
    weights = random.normal(size=(5, 24, 40))
    inputs = [jnp.asarray(array, jnp.float32) for array in (rows, weights, gradient)]
    inputs.insert(2, sizes)
    inputs[0] = inputs[0].at[int(sizes.sum()) :].set(jnp.nan)  # Nothing is in them.
    ours = grouped_matmul_module._ragged_gradients(*inputs)
    theirs = grouped_matmul_module._block_gradients(*inputs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_gathered_slices_are_those_of_ragged_all_to_all():
    """The example in the documentation of `jax.lax.ragged_all_to_all`, on two devices."""
    mesh = make_mesh(fsdp=1, expert=2, devices=jax.devices()[:2])
    of_devices = jax.P(mesh_axes("experts"))
    exchange = jax.shard_map(
        functools.partial(ragged_all_to_all_on_cpu, axis=mesh_axes("experts")[0]),
        mesh=mesh,
        in_specs=of_devices,
        out_specs=of_devices,
    )
    result = exchange(
        jnp.array([1.0, 2, 2, 3, 4, 0])[:, None],
        jnp.zeros((8, 1)),
        jnp.array([0, 1, 0, 1]),  # input_offsets
        jnp.array([1, 2, 1, 1]),  # send_sizes
        jnp.array([0, 0, 1, 2]),  # output_offsets
        jnp.array([1, 1, 2, 1]),  # recv_sizes
    )
    np.testing.assert_array_equal(result[:, 0], [1, 3, 0, 0, 2, 2, 4, 0])
