"""Calls with a cache give the same results as one call without, and the original's numbers."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_values

from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.sharding import make_mesh, variable_shardings

ARCHITECTURES = ("mistral", "mixtral")
# The widths of the calls that a text is read in: a prompt, single tokens, a longer insertion.
WIDTHS = (9, 1, 1, 6, 1)


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def make_reader(model):
    """Returns the jitted model call with a donated cache, as in text generation."""
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, static_argnames="is_causal", donate_argnames="cache")
    def read(state, tokens, segment_ids, cache, is_causal=True):
        model = nnx.merge(graph, state)
        return model(tokens, segment_ids=segment_ids, is_causal=is_causal, cache=cache)

    return functools.partial(read, state)


def random_parts(generator, num_rows):
    """Returns the tokens and segment ids of each call: rows of unequal lengths, padded."""
    for width in WIDTHS:
        lengths = generator.integers(0, width + 1, num_rows)
        is_token = np.arange(width) < lengths[:, None]
        is_padded_left = generator.random((num_rows, 1)) < 0.5
        is_token = np.where(is_padded_left, is_token[:, ::-1], is_token)
        tokens = generator.integers(1, 320, is_token.shape)
        yield np.where(is_token, tokens, 0), is_token.astype(np.int32)


def at_once(model, texts):
    """Returns the hidden states of each text in one call without a cache."""
    longest = max(len(text) for text in texts)
    is_token = np.arange(longest) < np.array([len(text) for text in texts])[:, None]
    tokens = np.zeros(is_token.shape, np.int32)
    tokens[is_token] = np.concatenate(texts)
    hidden = model(tokens, segment_ids=is_token.astype(np.int32))
    return [row[keep] for row, keep in zip(np.asarray(hidden), is_token, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("sliding_window", [None, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_of_any_length_give_the_hidden_states_of_the_whole(architecture, sliding_window):
    model = reference_values.load_model(architecture, sliding_window=sliding_window)
    read = make_reader(model)
    for seed in range(4):
        generator, num_rows = np.random.default_rng(seed), 3
        cache = model.make_cache(num_rows, sum(WIDTHS) + 2)
        texts, states = [[] for _ in range(num_rows)], [[] for _ in range(num_rows)]
        for tokens, segment_ids in random_parts(generator, num_rows):
            given = cache
            hidden, cache = read(tokens, segment_ids, cache)
            assert given.keys.is_deleted(), "a second copy of the cache"
            for row in range(num_rows):
                keep = segment_ids[row] > 0
                texts[row].append(tokens[row][keep])
                states[row].append(np.asarray(hidden)[row][keep])
        texts = [np.concatenate(parts) for parts in texts]
        for parts, expected in zip(states, at_once(model, texts), strict=True):
            assert_close(np.concatenate(parts), expected)
        assert int(cache.length) == sum(WIDTHS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_document_read_bidirectionally_and_a_question_on_top(architecture):
    values = reference_values.load_values(architecture)
    model = reference_values.load_model(architecture)
    document, suffix = values["cache_document_ids"], values["cache_suffix_ids"]
    length = document.shape[1]
    cache = model.make_cache(1, length + suffix.shape[1])
    _, cache = model(document, is_causal=False, cache=cache)
    for layer in range(model.config.num_hidden_layers):
        for ours, name in ((cache.keys, "key"), (cache.values, "value")):
            heads_first = ours[layer, :, :length].swapaxes(1, 2)
            assert_close(heads_first, values[f"cache_{name}_layer{layer}"])
    hidden, cache = model(suffix, cache=cache)
    assert_close(model.logits(hidden), values["cache_suffix_logits"])


def test_a_question_on_documents_of_unequal_lengths_gives_what_each_alone_gives():
    model = reference_values.load_model("mistral")
    read = make_reader(model)
    documents, question = [np.arange(3, 14), np.arange(20, 26)], np.arange(40, 45)
    is_token = np.arange(11) < np.array([[11], [6]])
    tokens = np.zeros(is_token.shape, np.int32)
    tokens[is_token] = np.concatenate(documents)
    cache = model.make_cache(2, 16)
    _, cache = read(tokens, is_token.astype(np.int32), cache, is_causal=False)
    together, _ = read(np.stack([question] * 2), np.ones((2, 5), np.int32), cache)
    for row, document in enumerate(documents):
        cache = model.make_cache(1, len(document) + len(question))
        _, cache = model(document[None], is_causal=False, cache=cache)
        alone, _ = model(question[None], cache=cache)
        assert_close(together[row], alone[0])


def test_an_instruction_read_causally_and_its_text_bidirectionally_on_top():
    model = reference_values.load_model("mistral")
    tokens, mask = np.arange(3, 15)[None], np.arange(12)[None] >= 5
    texts = reference_values.packed_texts(tokens, np.ones_like(mask), mask)
    hidden, _ = model.forward_streams({"texts": EmbeddingSpec(attention="cbcc").stream(texts)})
    instruction, cache = model(tokens[:, :5], cache=model.make_cache(1, 12))
    text, _ = model(tokens[:, 5:], is_causal=False, cache=cache)
    assert_close(jnp.concatenate([instruction, text], axis=1), hidden["texts"])


def test_several_texts_in_a_row_stay_apart():
    model = reference_values.load_model("mistral")
    tokens = np.arange(3, 13)[None]
    segment_ids = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 2]])
    positions = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    whole = model(tokens, positions, segment_ids)
    cache = model.make_cache(1, 10)
    read, cache = model(tokens[:, :8], positions[:, :8], segment_ids[:, :8], cache=cache)
    rest, cache = model(tokens[:, 8:], positions[:, 8:], segment_ids[:, 8:], cache=cache)
    assert_close(jnp.concatenate([read, rest], axis=1), whole)


def test_eight_devices_read_as_one_does():
    model = reference_values.load_model("mistral")
    tokens = np.arange(4 * 12).reshape(4, 12)
    expected, _ = model(tokens, cache=model.make_cache(4, 16))
    mesh = make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        cache = model.make_cache(4, 16)
        assert cache.keys.addressable_shards[0].data.size == cache.keys.size // 8
        state = nnx.state(model)
        nnx.update(model, jax.device_put(state, variable_shardings(state, mesh)))
        read = make_reader(model)
        parts = []
        for start, stop in ((0, 8), (8, 9), (9, 12)):
            part = tokens[:, start:stop]
            hidden, cache = read(part, np.ones_like(part), cache)
            parts.append(hidden)
        assert cache.keys.addressable_shards[0].data.size == cache.keys.size // 8
    assert_close(np.concatenate(parts, axis=1), expected)


def test_tokens_that_do_not_fit_are_an_error():
    model = reference_values.load_model("mistral")
    cache = model.make_cache(1, 8)
    with pytest.raises(ValueError, match="8 slots, 0 of them in use, has no room for rows of 9"):
        jax.eval_shape(lambda cache: model(jnp.ones((1, 9), jnp.int32), cache=cache), cache)
    _, cache = model(jnp.ones((1, 6), jnp.int32), cache=cache)
    with pytest.raises(ValueError, match="8 slots, 6 of them in use, has no room for rows of 3"):
        model(jnp.ones((1, 3), jnp.int32), cache=cache)
    _, cache = model(jnp.ones((1, 2), jnp.int32), cache=cache)
    assert int(cache.length) == cache.num_slots
