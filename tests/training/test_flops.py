"""Useful operations against products counted one by one."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from grit_jax.data.batch import Batch, ChatBatch, EmbeddingBatch
from grit_jax.data.packing import pack, plan_rows
from grit_jax.models import LoraConfig, ModelConfig, make_config
from grit_jax.text.examples import Text
from grit_jax.training.flops import peak_flops, useful_flops

D, F, V, L, N, K, H, E, C = 16, 24, 64, 3, 4, 2, 8, 4, 2
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
}
MISTRAL = ModelConfig(**SIZES)
MIXTRAL = make_config("mixtral", **SIZES, num_local_experts=E, num_experts_per_tok=C)

WINDOWS = dataclasses.replace(
    MISTRAL, sliding_window=4, layer_types=("sliding_attention", "full_attention")
)


def product(m, k, n):
    return 2 * m * k * n


def packed(lengths, num_rows=8):
    texts = [Text(np.ones(n, np.int32), np.arange(n) >= 2) for n in lengths]
    return pack(texts, plan_rows(lengths, 16), num_rows, 16)


def forward_by_hand(config, lengths, is_causal):
    total = 0
    for n in lengths:
        total += L * (product(n, D, N * H) + 2 * product(n, D, K * H) + product(n, N * H, D))
        for is_sliding in config.sliding_layers():
            window = (config.sliding_window if is_sliding else None) or n
            distances = [query - key for query in range(n) for key in range(n)]
            seen = sum(0 <= d < window if is_causal else abs(d) <= window for d in distances)
            seen -= n / 2 if is_causal else 0  # Half of the product with itself.
            total += N * (2 * H * seen + 2 * seen * H)
        experts, router = 1, 0
        if config is MIXTRAL:
            experts, router = C, product(n, D, E)
        total += L * (experts * (2 * product(n, D, F) + product(n, F, D)) + router)
    return total


@pytest.mark.parametrize(
    "config", [MISTRAL, MIXTRAL, WINDOWS], ids=["mistral", "mixtral", "windows"]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_it_counts_the_products_of_real_tokens(config, is_causal):
    queries, passages, chats = [3, 5], [7, 4, 16, 9], [6, 11, 2]
    numbers = np.arange(4, dtype=np.int32)
    embedding = EmbeddingBatch(packed(queries), packed(passages), numbers[:2], numbers)
    batch = Batch({"embedding": embedding, "generative": ChatBatch(packed(chats))})
    causal = {"query", "passage", "chat"} if is_causal else {"chat"}
    expected = 3 * sum(
        forward_by_hand(config, lengths, causal)
        for lengths, causal in ((queries, is_causal), (passages, is_causal), (chats, True))
    )
    targets = sum(n - 2 for n in chats)
    expected += 3 * product(targets, D, V)
    np.testing.assert_allclose(useful_flops(config, batch, causal), expected)
    # One of two hosts has half of the rows, and counts for both.
    halves = {
        name: jax.tree.map(lambda rows: rows[:4], dataclasses.replace(texts, num_rows=8))
        for name, texts in (("queries", packed([5, 5] * 12)), ("passages", packed([9] * 8)))
    }
    embedding = EmbeddingBatch(packed([5, 5] * 12), packed([9] * 8), numbers, numbers)
    whole = Batch({"embedding": embedding})
    half = Batch({"embedding": dataclasses.replace(embedding, **halves)})
    np.testing.assert_allclose(
        useful_flops(config, half, causal),
        useful_flops(config, whole, causal),
    )
    # Padding adds no operations.
    padded = Batch(batch.parts | {"generative": ChatBatch(packed(chats, num_rows=20))})
    np.testing.assert_allclose(useful_flops(config, padded, causal), expected)


def test_weights_that_are_not_trained_have_no_gradient():
    batch = Batch({"generative": ChatBatch(packed([6, 11, 2]))})
    adapted = dataclasses.replace(MISTRAL, lora=LoraConfig(rank=2, alpha=1.0, targets="*"))
    attention = sum(L * N * 2 * product(n, n, H) / 2 for n in [6, 11, 2])
    of_weights = useful_flops(MISTRAL, batch, {"chat"}) - 3 * attention
    expected = of_weights * 2 / 3 + 3 * attention
    np.testing.assert_allclose(useful_flops(adapted, batch, {"chat"}), expected)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v5 lite", 2 * 197e12),
        ("TPU v5p", 2 * 459e12),
        ("TPU v5", 2 * 459e12),
        ("NVIDIA H100 80GB HBM3", 2 * 989e12),
        ("cpu", None),
    ],
)
def test_the_peak_of_known_devices(kind, expected):
    assert peak_flops([types.SimpleNamespace(device_kind=kind)] * 2) == expected
