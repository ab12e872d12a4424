"""Embeddings equal the original's, do not depend on the batch, and errors name the text."""

import functools
import json
import shutil
import warnings

import datasets
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest
import reference_values
from tokenizer_files import write_sentencepiece, write_tokenizer

from grit_jax import GritLM, Sampling
from grit_jax.inference.prompt_encoder import InputError, PromptEncoder
from grit_jax.objectives.pooling import POOLINGS
from grit_jax.sharding import MeshError, make_mesh
from grit_jax.text.templates import embedding_prefix
from grit_jax.text.tokenizer import Tokenizer

INSTRUCTION = embedding_prefix("Given a word, retrieve its meaning")
TEXTS = ["A short one", "ünïcödé 🙂", "one\nmore line  and spaces", "word " * 300, "x" * 500, "Hm"]


def texts_of(values):
    """Returns the text and the instruction of each of the original's texts."""
    length = int(values["embed_instruction_len"])
    rows = zip(values["embed_input_ids"], values["embed_attention_mask"], strict=True)
    texts = [ids[mask.astype(bool)] for ids, mask in rows]
    return [(text[length:], text[:length]) for text in texts]


def encode_each(model, texts, **options):
    """Returns the embeddings of texts, each with its instruction."""
    return np.stack([model.encode(text, instruction=before, **options) for text, before in texts])


@pytest.mark.parametrize(
    ("architecture", "pooling", "normalized"),
    [*(("mistral", pooling, False) for pooling in POOLINGS), ("mixtral", "mean", True)],
)
def test_embeddings_are_those_of_the_original(reference_model, architecture, pooling, normalized):
    values = reference_values.load_values(architecture)
    model = reference_model(architecture, pooling=pooling, normalized=normalized)
    texts = texts_of(values)
    kind = "normalized" if normalized else "raw"
    expected = values[f"embedding_{pooling}_{kind}"]
    embeddings = encode_each(model, texts)
    assert embeddings.dtype == np.float32
    tolerance = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=tolerance)


def test_a_model_says_how_it_embeds_and_is_overruled(tmp_path, reference_model):
    values = reference_values.load_values("mistral")
    folder = shutil.copytree(reference_values.FOLDER / "tiny-mistral", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["grit"] = {"attention": "cccc", "pooling": "cls"}
    (folder / "config.json").write_text(json.dumps(config))
    load = functools.partial(GritLM.from_pretrained, folder, dtype="float32", normalized=False)
    mesh = reference_model().mesh
    texts = texts_of(values)[:2]
    for options, expected in (
        (
            {},
            encode_each(reference_model(attention="cccc", pooling="cls", normalized=False), texts),
        ),
        ({"attention": "bbcc", "pooling": "mean"}, values["embedding_mean_raw"][:2]),
    ):
        embeddings = encode_each(load(mesh=mesh, **options), texts)
        np.testing.assert_allclose(embeddings, expected, atol=1e-4 * np.abs(expected).max())


@functools.partial(nnx.jit, static_argnames="is_causal")
def hidden_states(module, tokens, segment_ids, is_causal):
    return module(tokens, segment_ids=segment_ids, is_causal=is_causal)


def num_shared(tokenizer, instruction, text):
    """Returns the number of tokens of the instruction: its last space belongs to the next word."""
    own, whole = tokenizer.encode(instruction), tokenizer.encode(instruction + text)
    while own != whole[: len(own)]:
        own.pop()
    return len(own)


def alone(model, text, instruction="", *, is_causal=False, pools_instruction=False):
    """Returns the normalized mean of a text's hidden states, computed in a separate row."""
    tokenizer = model.tokenizer
    tokens = np.array([tokenizer.bos_id, *tokenizer.encode(instruction + text)])
    skipped = 1 + num_shared(tokenizer, instruction, text) if instruction else 0
    positions = np.arange(600)[None]
    padded = np.where(positions < len(tokens), np.resize(tokens, positions.shape), 0)
    is_token = (positions < len(tokens)).astype(np.int32)
    hidden = hidden_states(model.model, padded, is_token, is_causal)[0, : len(tokens)]
    mean = np.asarray(hidden)[0 if pools_instruction else skipped :].mean(axis=0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("instruction", ["", INSTRUCTION, "Represent: "], ids=range(3))
def test_packed_texts_are_embedded_as_each_alone(model, instruction):
    embeddings = model.encode(TEXTS, instruction=instruction)
    expected = [alone(model, text, instruction) for text in TEXTS]
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    np.testing.assert_allclose(
        model.encode(TEXTS[1], instruction=instruction), expected[1], atol=1e-5
    )
    pooled = model.encode(TEXTS[:2], instruction=instruction, embed_instruction=True)
    expected = [alone(model, text, instruction, pools_instruction=True) for text in TEXTS[:2]]
    np.testing.assert_allclose(pooled, expected, atol=1e-5)


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_an_embedding_does_not_depend_on_order_or_batch(model, data):
    lengths = data.draw(st.lists(st.integers(1, 500), min_size=1, max_size=60))
    random = np.random.default_rng(sum(lengths))
    texts = [random.integers(3, 32000, length) for length in lengths]
    order = data.draw(st.permutations(range(len(texts))))
    batch_size = data.draw(st.sampled_from([1, 4, 256]))
    together = model.encode(texts)
    shuffled = model.encode([texts[number] for number in order], batch_size=batch_size)
    np.testing.assert_allclose(shuffled, together[list(order)], atol=1e-5)
    some = data.draw(st.integers(0, len(texts) - 1))
    np.testing.assert_allclose(model.encode(texts[some]), together[some], atol=1e-5)


def test_the_instruction_of_a_partly_causal_pattern(reference_model):
    model = reference_model(attention="cbcc")
    texts, instruction = [[7, 8, 9, 10], [11, 12], [13] * 9], [1, 2, 3, 4, 5]
    embeddings = model.encode(texts, instruction=instruction)
    # With a cache: two calls, the instruction causally, then the text bidirectionally.
    cached, caches = model.encode(texts, instruction=instruction, get_cache=True)
    np.testing.assert_allclose(embeddings, cached, atol=1e-5)
    assert [int(cache.length) for cache in caches] == [9, 7, 14]
    # Pooling the instruction does not change its attention.
    pooled = model.encode(texts, instruction=instruction, embed_instruction=True)
    cached, _ = model.encode(texts, instruction=instruction, embed_instruction=True, get_cache=True)
    np.testing.assert_allclose(pooled, cached, atol=1e-5)
    other = reference_model().encode(texts, instruction=instruction)
    assert np.abs(embeddings - other).max() > 1e-3


def test_a_token_of_instruction_and_text_is_the_texts_in_a_partly_causal_pattern(tmp_path, model):
    tokenizer = Tokenizer(str(write_tokenizer(tmp_path, "llama3")))
    partly_causal = GritLM(model.model, model.mesh, tokenizer, attention="cbcc")
    texts = [
        "word",
        "\nword",
        "more",
    ]  # The last line break of the instruction belongs to the second.
    expected = partly_causal.encode(texts, instruction=INSTRUCTION)
    found, caches = partly_causal.encode(texts, instruction=INSTRUCTION, get_cache=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    lengths = [1 + len(tokenizer.encode(INSTRUCTION + text)) for text in texts]
    assert [int(cache.length) for cache in caches] == lengths


def test_a_causal_model(model):
    causal = type(model)(model.model, model.mesh, model.tokenizer, attention="cccc")
    np.testing.assert_allclose(
        causal.encode(TEXTS[0]), alone(model, TEXTS[0], is_causal=True), atol=1e-5
    )


@pytest.mark.slow
def test_eight_devices_embed_as_one_does(reference_model):
    random = np.random.default_rng(0)
    texts = [random.integers(3, 320, length) for length in random.integers(1, 300, 40)]
    expected = reference_model().encode(texts)
    on_eight = reference_model(on_eight_devices=True)
    np.testing.assert_allclose(on_eight.encode(texts), expected, atol=1e-5)
    np.testing.assert_allclose(on_eight.encode(texts[:1]), expected[:1], atol=1e-5)
    cached, caches = on_eight.encode(texts[:3], get_cache=True)
    np.testing.assert_allclose(cached, expected[:3], atol=1e-5)
    assert [int(cache.length) for cache in caches] == [len(text) for text in texts[:3]]


def test_few_programs_are_compiled_whatever_the_texts(model, count_compilations):
    fresh = type(model)(model.model, model.mesh, model.tokenizer)
    random = np.random.default_rng(0)
    with count_compilations() as compilations:
        for count in random.integers(1, 200, 6):
            texts = [random.integers(3, 32000, n) for n in random.integers(1, 250, count)]
            fresh.encode(texts, batch_size=int(random.integers(1, 300)))
    assert 1 <= len(compilations) <= 5


@pytest.mark.slow
@pytest.mark.parametrize("num_texts", [1, 3])
def test_a_warm_model_compiles_nothing(model, count_compilations, num_texts):
    fresh = type(model)(model.model, model.mesh, model.tokenizer)
    sampling = Sampling(temperature=0.5)
    fresh.warm_up(num_texts, 300, 8, sampling=sampling)
    with count_compilations() as compilations:
        for length in (1, 20, 100, 300):
            texts = [[5] * length] * num_texts
            fresh.encode(texts)
            fresh.encode(texts[0], instruction=[5])
            fresh.generate(texts, 8, temperature=0.7, seed=length)
    assert compilations == []


def test_documents_are_their_title_and_text(model):
    corpus: list[dict] = [{"title": "Title", "text": "The text"}, {"text": "Only text"}]
    expected = model.encode(["Title The text", "Only text"], instruction=INSTRUCTION)
    np.testing.assert_array_equal(model.encode_corpus(corpus, instruction=INSTRUCTION), expected)
    np.testing.assert_array_equal(
        model.encode_corpus(corpus[0], instruction=INSTRUCTION).shape, expected[0].shape
    )
    np.testing.assert_array_equal(
        model.encode_queries(["Title The text", "Only text"], instruction=INSTRUCTION), expected
    )
    for title in (None, ""):
        corpus[1]["title"] = title
        found = model.encode_corpus(corpus, instruction=INSTRUCTION)
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match="document 1 has no string 'text'"):
        model.encode_corpus([{"text": "a"}, {"title": "b"}])
    with pytest.raises(InputError, match="document 0: 'title' is not a string"):
        model.encode_corpus([{"text": "a", "title": 7}])


def test_arrays_of_jax_and_of_the_models_type(model):
    embeddings = model.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(embeddings, jax.Array)
    np.testing.assert_array_equal(embeddings, model.encode(TEXTS))
    half = model.from_pretrained(reference_values.FOLDER / "tiny-mistral", mesh=model.mesh)
    texts = [[5, 6, 7], [8]]
    assert half.encode(texts, convert_to_tensor=True, recast=True).dtype == jnp.bfloat16
    rounded = half.encode(texts, recast=True)
    assert rounded.dtype == np.float32
    assert np.abs(rounded - half.encode(texts)).max() > 0


def test_token_ids_are_used_as_they_are(model):
    tokenizer = model.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXTS[0])]
    expected = model.encode(TEXTS[0])
    for form in (ids, np.array(ids)):
        np.testing.assert_allclose(model.encode(form), expected, atol=1e-6)
        np.testing.assert_allclose(model.encode([form, [9]])[0], expected, atol=1e-5)
    columns = (
        np.array(["a", "b"]),
        ("a", "b"),
        (text for text in "ab"),
        pandas.Series(["a", "b"], index=[7, 8]),
        datasets.Dataset.from_dict({"text": ["a", "b"]})["text"],
    )
    for column in columns:
        np.testing.assert_array_equal(model.encode(column), model.encode(["a", "b"]))
    plain = model.encode(TEXTS[0], add_special_tokens=False)
    np.testing.assert_allclose(model.encode(ids[1:]), plain, atol=1e-6)
    assert np.abs(plain - expected).max() > 1e-3


def test_a_text_that_the_tokenizer_drops_is_named(tmp_path):
    tokenizer = Tokenizer(str(write_sentencepiece(tmp_path, 60)))
    encoder = PromptEncoder(tokenizer, tokenizer.vocab_size)
    for instruction in ("find", ""):
        assert encoder.encode("fox", instruction, add_bos=True, name="text 3").mask.any()
        with pytest.raises(InputError, match="text 3 has only characters that the tokenizer drops"):
            encoder.encode("\u200b", instruction, add_bos=True, name="text 3")


def test_progress_is_shown_from_256_texts_on_or_as_asked(model, capfd):
    model.encode([[5]] * 255)
    assert capfd.readouterr().err == ""
    model.encode([[5]] * 256)
    assert "Embedding" in capfd.readouterr().err
    model.encode([[5]] * 256, show_progress_bar=False)
    assert capfd.readouterr().err == ""
    model.encode([[5]], show_progress_bar=True)
    assert "Embedding" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no texts were given"),
        (["a", " \n"], {}, "text 1 is empty: leave it out"),
        (["a", []], {}, "text 1 is empty: leave it out"),
        (["a", None], {}, "text 1 is None: it must be a string, or one list of token ids"),
        (["a", 1.5], {}, "text 1 is of type float"),
        (["a", [[1]]], {}, "text 1 is of type list"),
        (7, {}, "texts are of type int: give a list of strings"),
        ({"a", "b"}, {}, "texts are of type set"),
        ({"a": 1}, {}, "texts are of type dict"),
        (b"ab", {}, "texts are of type bytes"),
        ([{"text": "a"}], {}, "dictionaries with 'text': pass them to `encode_document`"),
        ([{"role": "user", "content": "a"}], {}, "'role', 'content': pass them to `chat` or"),
        ([[{"role": "user", "content": "a"}]], {}, "'role', 'content': pass them to `chat` or"),
        (["a", b"b"], {}, "text 1 is of type bytes"),
        ([[True, False]], {}, "text 0 is of type list"),
        (["a", "b\ud83d"], {}, "text 1 has half of a surrogate pair at character 1: correct"),
        (["a"], {"instruction": "\ud83d"}, "the instruction has half of a surrogate pair"),
        (np.array([1.5]), {}, "text 0 is of type float64"),
        ([[5, 32000]], {}, "has the token id 32000, but the ids of this model are 0 to 31999"),
        (["a"], {"instruction": None}, "the instruction is None"),
        (["a"], {"instruction": [5]}, "instruction is token ids, so text 0 must be token ids too"),
        (["a", "b " * 600], {}, "1 of 2 texts are longer than 512 tokens, instruction included; "
         "the longest, number 1, has 60[0-9]: raise max_length, up to 700, or pass truncate=True"),
        (["b " * 800], {"max_length": 900}, "longer than 700 .* this model supports 700"),
        (["b " * 9], {"max_length": 4, "instruction": INSTRUCTION, "truncate": True},
         "text 0: its instruction alone takes all 4 tokens"),
        (["a"], {"max_length": 0}, "max_length=0 must be an integer of at least 1"),
        (["a"], {"max_length": 2.5}, "max_length=2.5 must be an integer"),
        (["a"], {"batch_size": 0}, "batch_size=0 must be an integer of at least 1"),
    ],
)  # fmt: skip
def test_invalid_texts_are_errors(model, texts, options, message):
    with pytest.raises(ValueError, match=message):
        model.encode(texts, **options)


def test_texts_are_truncated_on_request(model):
    with pytest.warns(UserWarning, match="1 of 2 texts were truncated to 20 tokens"):
        embeddings = model.encode(["word " * 100, "short"], max_length=20, truncate=True)
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("word " * 100)]
    np.testing.assert_allclose(embeddings[0], model.encode(ids[:20]), atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(["word " * 100], truncate=True)


def test_devices_that_do_not_divide_a_model_are_refused():
    folder, three = reference_values.FOLDER / "tiny-mistral", make_mesh(devices=jax.devices()[:3])
    with pytest.raises(MeshError, match=r"fsdp=3 does not divide config.model.sizes.hidden_size"):
        GritLM.from_pretrained(folder, mesh=three)


def test_unknown_choices_and_a_missing_tokenizer_are_errors(reference_model):
    with pytest.raises(ValueError, match="pooling='max' must be one of mean, weightedmean"):
        reference_model(pooling="max")
    with pytest.raises(ValueError, match="attention='bb' must be one of bbcc, cbcc, cccc"):
        reference_model(attention="bb")
    with pytest.raises(InputError, match=r"no tokenizer .* pass tokenizer=PATH"):
        reference_model().encode("a string")
