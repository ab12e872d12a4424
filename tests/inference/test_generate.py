"""Generated text equals the original's and transformers', and does not depend on the batch."""

import functools
import os

os.environ["HF_HUB_OFFLINE"] = "1"

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_values

from grit_jax import GritLM
from grit_jax.conversion import HuggingFaceModel
from grit_jax.conversion.export import write_hugging_face
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.sharding import make_mesh
from grit_jax.text.templates import chat_prompt

PROMPTS = [
    chat_prompt("Who are you?", is_first=True),
    "One",
    chat_prompt("Say something about the sea, " * 12, is_first=True),
    "Mid size of a prompt, with ünïcödé",
]
# More tokens than one call of the decoding program generates.
NEW = 36


@functools.partial(nnx.jit, static_argnames="count")
def continued(module, tokens, length, count):
    """Returns the greedy tokens after a padded prompt, without a cache."""

    def add(i, tokens):
        is_token = jnp.arange(tokens.shape[1])[None] < length + i
        logits = module.logits(module(tokens, segment_ids=is_token.astype(jnp.int32)))
        return tokens.at[0, length + i].set(jnp.argmax(logits[0, length + i - 1]))

    tokens = jax.lax.fori_loop(0, count, add, tokens)
    return jax.lax.dynamic_slice(tokens, (0, length), (1, count))[0]


def expected_ids(model, ids, count):
    tokens = np.zeros((1, 96 if len(ids) < 60 else 576), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(continued(model.model, tokens, len(ids), count))


def prompt_ids(model, text):
    return [model.tokenizer.bos_id, *model.tokenizer.encode(text)]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mistral", "mixtral"])
def test_greedy_tokens_are_those_of_the_original(reference_model, architecture):
    values = reference_values.load_values(architecture)
    prompts, whole = values["prompt_ids"], values["greedy_ids"]
    model, length = reference_model(architecture), prompts.shape[1]
    model = GritLM(model.model, model.mesh, end_tokens=[])
    found = model.generate(list(prompts), whole.shape[1] - length)
    np.testing.assert_array_equal(found, whole[:, length:])


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Folders of a Mistral with a short window and of a Mixtral, as transformers loads them."""
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig, MixtralConfig

    torch.manual_seed(0)
    folders = {}
    for name, config_class in {"mistral": MistralConfig, "mixtral": MixtralConfig}.items():
        config = config_class(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
            sliding_window=24 if name == "mistral" else None,
        )  # fmt: skip
        root = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / "saved")
        folders[name] = root / "exported"
        write_hugging_face(HuggingFaceModel(root / "saved"), folders[name])
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "mixtral"])
def test_text_is_that_of_transformers(exported, name):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(exported[name], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(exported[name])
    mesh = make_mesh(devices=jax.devices()[:1])
    ours = GritLM.from_pretrained(exported[name], dtype="float32", mesh=mesh)

    def text_of(prompt, **options):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = theirs.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)[0]
        before = tokenizer.decode(inputs.input_ids[0], skip_special_tokens=True)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert whole.startswith(before)
        return whole[len(before) :]

    plain = ours.generate(PROMPTS, NEW)
    assert plain == [text_of(prompt) for prompt in PROMPTS]
    if name == "mistral":
        penalized = [text_of(prompt, repetition_penalty=1.3) for prompt in PROMPTS[:2]]
        assert ours.generate(PROMPTS[:2], NEW, repetition_penalty=1.3) == penalized != plain[:2]


@pytest.mark.slow
def test_a_prompt_is_continued_as_if_alone(model):
    long_prompt = list(np.random.default_rng(0).integers(3, 32000, 530))
    prompts = [prompt_ids(model, PROMPTS[0]), long_prompt, [5]]
    expected = [expected_ids(model, prompt, NEW) for prompt in prompts]
    found = model.generate(prompts, NEW, batch_size=2)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(model.generate(np.array(prompts[0]), NEW), expected[0])


def test_eight_devices_generate_as_one_does(reference_model):
    prompts = [[5, 6, 7], list(range(3, 40)), [9]]
    expected = reference_model().generate(prompts, 6)
    found = reference_model(on_eight_devices=True).generate(prompts, 6)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_each_row_ends_with_its_own_end_of_text(model):
    whole = model.generate([[5, 6], [7], [8] * 9], NEW)
    end = int(whole[1][10])
    ending = GritLM(model.model, model.mesh, end_tokens=[end, 2])
    for found, row in zip(ending.generate([[5, 6], [7], [8] * 9], NEW), whole, strict=True):
        ends = np.flatnonzero(row == end)
        np.testing.assert_array_equal(found, row[: ends[0]] if len(ends) else row)


def test_sampled_tokens_depend_on_the_seed_and_the_index_of_the_prompt(reference_model):
    model = reference_model()
    prompts = [[5, 6, 7], list(range(3, 30)), [9], [5, 6, 7]]

    def draw(prompts, **options):
        found = model.generate(prompts, 10, temperature=1.0, top_p=0.9, **options)
        return [ids.tolist() for ids in found]

    found = draw(prompts, seed=1)
    assert draw(prompts, seed=1) == found
    assert draw(prompts, seed=1, batch_size=2) == found
    assert draw(prompts[:2], seed=1, batch_size=2) == found[:2]
    assert draw(prompts[2:], seed=1, first_index=2) == found[2:]
    assert draw(prompts, seed=2) != found
    assert found[0] != found[3]


def test_stop_strings_and_streams(model):
    whole = model.generate(PROMPTS[:2], NEW)
    pieces = list(model.stream(PROMPTS[0], NEW))
    assert "".join(pieces) == whole[0]
    assert len(pieces) > 5
    assert model.generate(PROMPTS[:2], NEW, stop=None) == whole
    stop = whole[0][len(whole[0]) // 2 :][:6]
    before = whole[0][: whole[0].index(stop)]
    assert model.generate(PROMPTS[0], NEW, stop=stop) == before
    assert model.generate(PROMPTS[:2], NEW, stop=["never", stop]) == [before, whole[1]]
    assert "".join(model.stream(PROMPTS[0], NEW, stop=stop)) == before
    _, caches = model.encode([PROMPTS[2]], get_cache=True)
    behind = model.generate(PROMPTS[0], NEW, cache=caches)
    for cache in (caches, caches[0]):
        assert "".join(model.stream(PROMPTS[0], NEW, cache=cache)) == behind != whole[0]
    ids = model.generate(prompt_ids(model, PROMPTS[0]), NEW, stop=stop)
    assert stop in model.tokenizer.decode(ids.tolist())
    assert stop not in model.tokenizer.decode(ids[:-1].tolist())


@nnx.jit
def likeliest(module, tokens, cache):
    hidden, cache = module(tokens, cache=cache)
    return jnp.argmax(module.logits(hidden[:, -1:]), axis=-1), cache


@pytest.mark.slow
def test_prompts_after_cached_documents(reference_model):
    values = reference_values.load_values("mistral")
    model = reference_model()
    document, suffix = values["cache_document_ids"][0], values["cache_suffix_ids"][0]
    documents, prompts = [document, document[:7]], [suffix, [5, 6]]
    _, caches = model.encode(documents, get_cache=True)
    found = model.generate(prompts, 12, cache=caches)
    assert found[0][0] == values["cache_suffix_logits"][0, -1].argmax()
    for row, (text, prompt) in enumerate(zip(documents, prompts, strict=True)):
        cache = model.model.make_cache(1, 100)
        _, cache = model.model(jnp.asarray(text)[None], is_causal=False, cache=cache)
        tokens, expected = jnp.asarray(prompt)[None], []
        for _ in range(12):
            tokens, cache = likeliest(model.model, tokens, cache)
            expected.append(int(tokens[0, 0]))
        np.testing.assert_array_equal(found[row], expected)
    on_devices = model.encode(documents, get_cache=True, convert_to_tensor=True)[1]
    assert isinstance(on_devices[0].keys, jax.Array)
    np.testing.assert_array_equal(model.generate(prompts[0], 12, cache=on_devices[0]), found[0])


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no texts were given"),
        (["a", ""], {}, "prompt 1 is empty"),
        (["a", "\ud83d"], {}, "prompt 1 has half of a surrogate pair"),
        ([3.5], {}, "prompt 0 is of type float"),
        (["a", "b " * 690], {"max_new_tokens": 20}, "prompt 1 has 69[0-9] tokens, which with "
         "max_new_tokens=20 exceeds the model's context of 700: shorten it"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens=0 must be an integer of at least 1"),
        (["a"], {"top_k": 3}, "top_k=3 has no effect"),
        (["a"], {"seed": -1}, "seed=-1 must be an integer from 0 to 4294967295"),
        (["a"], {"seed": 2**32}, "seed=4294967296 must be an integer from 0 to 4294967295"),
        (["a"], {"first_index": -1}, "first_index=-1 must be an integer of at least 0"),
        (["a"], {"batch_size": 0}, "batch_size=0 must be an integer of at least 1"),
        (["a"], {"cache": []}, "there are 0 caches for 1 prompts: give one for each"),
        (["a"], {"stop": ["b", ""]}, "a stop string is empty"),
    ],
)  # fmt: skip
def test_invalid_prompts_are_errors(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, **options)


@pytest.mark.slow
def test_few_programs_are_compiled_whatever_the_prompts(model, count_compilations):
    fresh = GritLM(model.model, model.mesh, model.tokenizer)
    random = np.random.default_rng(0)
    with count_compilations() as compilations:
        for count in range(1, 9):
            prompts = [random.integers(3, 32000, n) for n in random.integers(1, 500, count)]
            fresh.generate(prompts, int(random.integers(2, 60)), batch_size=2)
    # Prompts of up to 32, 128 or 512 tokens, caches of 128, 256, 512 or 768, one row or two.
    assert len(compilations) <= 24, compilations


def test_a_stream_is_of_one_prompt(model):
    with pytest.raises(InputError, match="stream takes one prompt, not 2"):
        model.stream(["a", "b"])
