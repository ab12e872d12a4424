"""A paged cache gives the same hidden states as no cache, and as a contiguous one."""

import dataclasses

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.models import ModelConfig, PagedCache, make_model

PAGE = 4


@pytest.fixture(scope="module", params=[None, 6], ids=["full", "window"])
def decoder(request):
    config = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.2,
        sliding_window=request.param,
        dtype="float32",
    )
    return make_model(config, 0)


@nnx.jit(static_argnames="is_causal")
def call(model, tokens, segment_ids, cache, is_causal):
    return model(tokens, segment_ids=segment_ids, cache=cache, is_causal=is_causal)


def test_chunks_of_several_rows_are_read_as_whole_rows(decoder):
    tokens = np.random.default_rng(0).integers(0, 64, (2, 19))
    empty = decoder.make_pages(12, PAGE)
    # Rows end at different tokens, and their pages lie in any order. The first page is shared.
    tokens[1, :PAGE] = tokens[0, :PAGE]
    table = np.array([[7, 3, 9, 0, 11], [7, 5, 2, 10, 4]])
    keys, values = empty.keys.at[:].set(3.0), empty.values.at[:].set(5.0)
    cache = PagedCache(keys, values, table, np.zeros(2, np.int32))
    lengths, chunks = [19, 14], []
    for start, stop in ((0, 5), (5, 12), (12, 19)):
        is_token = np.arange(start, stop) < np.array(lengths)[:, None]
        hidden, cache = call(
            decoder, tokens[:, start:stop], is_token.astype(np.int32), cache, is_causal=True
        )
        cache = dataclasses.replace(cache, slots=None)
        chunks.append(hidden)
    found, expected = jnp.concatenate(chunks, axis=1), decoder(tokens)
    np.testing.assert_array_equal(cache.lengths, lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found[row, :length], expected[row, :length], atol=2e-6)
    unused = [1, 6, 8]
    assert (cache.keys[:, unused] == 3).all() and (cache.values[:, unused] == 5).all()


def test_a_question_follows_a_bidirectional_document(decoder):
    document, question = np.random.default_rng(1).integers(0, 64, (2, 1, 10))
    ones = np.ones_like(document)
    pages = decoder.make_pages(6, PAGE)
    paged = dataclasses.replace(
        pages, page_table=np.array([[5, 1, 3, 0, 2]]), lengths=np.zeros(1, int)
    )
    hidden = {}
    for name, cache in {"contiguous": decoder.make_cache(1, 20), "paged": paged}.items():
        _, cache = call(decoder, document, ones, cache, is_causal=False)
        cache = dataclasses.replace(cache, slots=None) if name == "paged" else cache
        hidden[name], _ = call(decoder, question, ones, cache, is_causal=True)
    np.testing.assert_allclose(hidden["paged"], hidden["contiguous"], atol=2e-6)
