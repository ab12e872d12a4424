"""The attention mask, and the equality of all implementations of attention."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import pytest

from grit_jax import models
from grit_jax.models import AttentionError, ModelConfig, Stream
from grit_jax.models.attention import AttentionMask, attention, largest_block
from grit_jax.sharding import make_mesh, partition_spec, variable_shardings

SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 0]])
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 0]])
INSTRUCTION = np.array([[True, True, False, False, True, False, False]])

PICTURES = {
    "full": """
        x x x x . . .
        x x x x . . .
        x x x x . . .
        x x x x . . .
        . . . . x x .
        . . . . x x .
        . . . . . . x
    """,
    "causal": """
        x . . . . . .
        x x . . . . .
        x x x . . . .
        x x x x . . .
        . . . . x . .
        . . . . x x .
        . . . . . . x
    """,
    "causal instruction": """
        x . . . . . .
        x x . . . . .
        x x x x . . .
        x x x x . . .
        . . . . x . .
        . . . . x x .
        . . . . . . x
    """,
    "window": """
        x x x . . . .
        x x x x . . .
        x x x x . . .
        . x x x . . .
        . . . . x x .
        . . . . x x .
        . . . . . . x
    """,
    "causal window": """
        x . . . . . .
        x x . . . . .
        . x x . . . .
        . . x x . . .
        . . . . x . .
        . . . . x x .
        . . . . . . x
    """,
    "causal instruction in a window": """
        x . . . . . .
        x x . . . . .
        x x x x . . .
        . x x x . . .
        . . . . x . .
        . . . . x x .
        . . . . . . x
    """,
}
KINDS = {
    "full": {"is_causal": False},
    "causal": {"is_causal": True},
    "causal instruction": {"is_causal": False, "causal_query_mask": INSTRUCTION},
    "window": {"is_causal": False, "sliding_window": 2},
    "causal window": {"is_causal": True, "sliding_window": 2},
    "causal instruction in a window": {
        "is_causal": False,
        "causal_query_mask": INSTRUCTION,
        "sliding_window": 2,
    },
}


@pytest.mark.parametrize("kind", PICTURES)
def test_which_keys_a_query_attends_to(kind):
    expected = [[mark == "x" for mark in line.split()] for line in PICTURES[kind].split("\n")]
    mask = AttentionMask(SEGMENTS, POSITIONS, **KINDS[kind])
    np.testing.assert_array_equal(mask.as_array()[0], expected[1:-1])
    in_scan = dataclasses.replace(mask, is_sliding=jnp.array(True))
    np.testing.assert_array_equal(in_scan.as_array()[0], expected[1:-1])
    full = AttentionMask(SEGMENTS, POSITIONS, **{**KINDS[kind], "sliding_window": None}).as_array()
    for is_sliding in (False, jnp.array(False)):
        without = dataclasses.replace(mask, is_sliding=is_sliding).as_array()
        np.testing.assert_array_equal(without, full)


# ---- The kernel for TPUs ----

IN_CACHE = np.ones((2, 256), np.int32)
ROWS, LENGTH, HEADS, KEY_HEADS, HEAD_DIM = 4, 384, 4, 2, 8
BLOCK = 128  # three a row
WINDOW = 150


def packed_rows(generator):
    """Returns segment ids and positions of rows with several texts, the last row without any."""
    segment_ids = np.zeros((ROWS, LENGTH), np.int32)
    positions = np.zeros((ROWS, LENGTH), np.int32)
    for row in range(ROWS - 1):
        ends = np.sort(generator.choice(np.arange(1, LENGTH + 1), 4, replace=False))
        for text, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            segment_ids[row, start:end] = 4 * row + text + 1
            positions[row, start:end] = np.arange(end - start)
    return segment_ids, positions


def heads_and_gradients(implementation, kind, mesh=None):
    """Returns the output of attention for tokens, and the gradients of a loss on it."""
    generator = np.random.default_rng(0)
    segment_ids, positions = packed_rows(generator)
    is_token = (segment_ids > 0)[:, :, None, None]
    shapes = [(ROWS, LENGTH, count, HEAD_DIM) for count in (HEADS, KEY_HEADS, KEY_HEADS)]
    inputs = [generator.normal(size=shape).astype(np.float32) for shape in shapes]
    weights = generator.normal(size=shapes[0]).astype(np.float32) * is_token

    def loss(query, key, value, segment_ids, positions):
        mask = AttentionMask(segment_ids, positions, **kind)
        mixed = attention(query, key, value, mask, implementation, BLOCK)
        return jnp.sum(mixed * weights), mixed

    row_arrays = (segment_ids, positions)
    if mesh is not None:
        rows = NamedSharding(mesh, partition_spec("batch"))
        inputs, row_arrays = jax.device_put((inputs, row_arrays), rows)
    compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, mixed), gradients = compute(*inputs, *row_arrays)
    assert np.isfinite(mixed).all(), "padding is no number"
    return [np.where(is_token, mixed, 0), *(np.asarray(gradient) for gradient in gradients)]


@pytest.mark.parametrize(
    ("length", "block_size", "block"),
    [(2560, 1024, 640), (2560, 512, 512), (512, 1024, 512), (896, 1024, 896), (896, 800, 128)],
)
def test_a_row_falls_into_the_largest_blocks_that_divide_it(length, block_size, block):
    assert largest_block(length, block_size) == block


@pytest.mark.parametrize("sliding_window", [None, WINDOW])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mesh_axes", [None, {"fsdp": 4, "tensor": 2}], ids=["one", "eight"])
def test_splash_gives_the_numbers_and_gradients_of_xla(is_causal, sliding_window, mesh_axes):
    kind = {"is_causal": is_causal, "sliding_window": sliding_window}
    expected = heads_and_gradients("xla", kind)
    if mesh_axes is None:
        results = heads_and_gradients("splash", kind)
    else:
        mesh = make_mesh(**mesh_axes)
        with jax.set_mesh(mesh):
            results = heads_and_gradients("splash", kind, mesh)
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(
    ("case", "has_kernel"),
    [
        ({"is_causal": True}, True),
        ({"is_causal": False}, True),
        ({"is_causal": True, "sliding_window": WINDOW}, True),
        ({"is_causal": True, "sliding_window": WINDOW, "is_sliding": jnp.array(True)}, True),
        ({"is_causal": False, "causal_query_mask": np.ones((2, 256), bool)}, False),
        ({"is_causal": True, "key_segment_ids": IN_CACHE, "key_positions": IN_CACHE}, False),
        ({"is_causal": True, "length": 200}, False),
    ],
)
def test_auto_uses_the_kernel_on_a_tpu_for_the_cases_it_supports(monkeypatch, case, has_kernel):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    length = case.get("length", 256)
    kind = {name: value for name, value in case.items() if name != "length"}
    ones = jnp.ones((2, length), jnp.int32)
    heads = [jnp.ones((2, length, count, HEAD_DIM)) for count in (HEADS, KEY_HEADS, KEY_HEADS)]
    program = jax.jit(lambda *heads: attention(*heads, AttentionMask(ones, ones, **kind)))
    lowered = program.trace(*heads).lower(lowering_platforms=("tpu",))
    assert ("tpu_custom_call" in lowered.as_text()) == has_kernel


# ---- In a model ----

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 1.0,
}
TOKENS = np.arange(2 * 128, dtype=np.int32).reshape(2, 128) % 64


def make_model(implementation, **fields):
    return models.make_model(
        ModelConfig(**SIZES | fields, attention_implementation=implementation), seed=0
    )


def hidden_and_gradients(model, tokens, mesh):
    """Returns the hidden states of two streams, and the gradients of a loss on both."""
    graph, state = nnx.split(model)
    segment_ids, positions = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(128), tokens.shape)
    weights = jax.random.normal(jax.random.key(0), (*tokens.shape, SIZES["hidden_size"]))

    def loss(state):
        streams = {
            "bidirectional": Stream(tokens, segment_ids, positions, is_causal=False),
            "causal": Stream(tokens, segment_ids, positions, is_causal=True),
        }
        hidden, _ = nnx.merge(graph, state).forward_streams(streams)
        return sum(jnp.sum(h * weights) for h in hidden.values()), hidden

    with jax.set_mesh(mesh):
        if mesh.size > 1:
            state = jax.device_put(state, variable_shardings(state, mesh))
        (_, hidden), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
    return hidden, jax.tree.leaves(gradients)


@pytest.mark.slow
def test_a_model_trains_on_eight_devices_with_the_implementation_of_its_configuration():
    tokens = jnp.asarray(np.tile(TOKENS, (2, 1)))
    one, eight = make_mesh(devices=jax.devices()[:1]), make_mesh(fsdp=4, tensor=2)
    windows = {"sliding_window": 20, "layer_types": ("sliding_attention", "full_attention")}
    expected = hidden_and_gradients(make_model("xla", **windows), tokens, one)
    splash = make_model("splash", **windows)
    results = hidden_and_gradients(splash, tokens, eight)
    for ours, theirs in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    assert "pallas_call" in str(jax.make_jaxpr(splash)(TOKENS)), "not the kernel"


def run_partly_causal(model):
    ones = jnp.ones_like(TOKENS)
    stream = Stream(TOKENS, ones, TOKENS, is_causal=False, causal_query_mask=ones > 0)
    model.forward_streams({"texts": stream})


@pytest.mark.parametrize(
    ("implementation", "fields", "read", "reason"),
    [
        ("splash", {}, lambda model: model(TOKENS[:, :100]), "rows of 100 positions"),
        ("splash", {}, run_partly_causal, "tokens are partly causal"),
        ("splash", {}, lambda model: model(TOKENS, cache=model.make_cache(2, 256)), "a cache"),
        ("cudnn", {}, lambda model: model(TOKENS), "the type float32"),
        ("cudnn", {"dtype": "bfloat16"}, lambda model: model(TOKENS), "the platform cpu"),
        ("cudnn", {"dtype": "bfloat16"}, lambda model: model(TOKENS[:, :3]), "rows of 3 pos"),
        (
            "cudnn",
            {"dtype": "bfloat16", "head_dim": 12},
            lambda model: model(TOKENS),
            "head_dim=12",
        ),
    ],
)
def test_an_unsupported_case_is_named(implementation, fields, read, reason):
    model = make_model(implementation, **fields)
    with pytest.raises(AttentionError, match=reason) as error:
        read(model)
    assert f"config.model.attention_implementation={implementation!r}" in str(error.value)


def test_rows_that_the_mesh_does_not_split_are_named():
    with (
        jax.set_mesh(make_mesh(fsdp=4, tensor=2)),
        pytest.raises(AttentionError, match="axis 'batch' of size 2 on 4 shards"),
    ):
        jax.eval_shape(make_model("splash"), TOKENS)
