"""Rotary embeddings whose frequencies depend on the length of a text."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_batches import SIZES
from small_model import one_device

from grit_jax import GritLM
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.inference.shared_gritlm import SharedGritLM
from grit_jax.models import make_config, make_model

HALF = SIZES["head_dim"] // 2
ORIGINAL = {"original_max_position_embeddings": 8, "factor": 3.0}
SCALINGS = {
    "dynamic": ORIGINAL,
    "longrope": {**ORIGINAL, "short_factor": [1.5] * HALF, "long_factor": [4.0] * HALF},
}


@pytest.mark.parametrize("rope_type", SCALINGS)
def test_packed_texts_have_the_frequencies_of_their_own_lengths(rope_type):
    """Two texts up to the original length and two beyond it, in one row or in one each."""
    scaling = {"rope_type": rope_type, **SCALINGS[rope_type]}
    model = make_model(make_config("mistral", **SIZES, rope_scaling=scaling), 0)
    lengths = (5, 12, 8, 9)
    tokens = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (1, sum(lengths)))
    segment_ids = np.repeat(np.arange(1, 5), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    packed = model(tokens, positions[None], segment_ids[None], is_causal=False)[0]
    rows = np.zeros((4, 12), int)
    for row, length in enumerate(lengths):
        rows[row, :length] = tokens[0, segment_ids == row + 1]
    alone = model(rows, segment_ids=(rows > 0).astype(int), is_causal=False)
    np.testing.assert_allclose(packed, alone[rows > 0], atol=1e-5)
    short = model(rows[:1, :5], is_causal=False)
    assert jnp.abs(short - packed[:5]).max() < 1e-5


def test_a_long_prompt_is_read_as_a_whole(monkeypatch):
    """Keys of the first chunk depend on the length of the others."""
    scaling = {"rope_type": "longrope", **SCALINGS["longrope"]}
    scaling["original_max_position_embeddings"] = 20
    config = make_config("mistral", **SIZES, rope_scaling=scaling)
    model = GritLM(make_model(config, 0), one_device())
    prompts = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (3, 30)).tolist()
    whole = model.generate(prompts, max_new_tokens=8)
    monkeypatch.setattr("grit_jax.inference.generate.PREFILL_LENGTHS", (16,))
    found = model.generate(prompts, max_new_tokens=8)
    np.testing.assert_array_equal(found, whole)
    with pytest.raises(InputError, match="rope_type='longrope' depend on the length"):
        SharedGritLM(model, cache_tokens=64, max_running=1)
