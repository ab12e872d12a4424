"""`GritLM` formats prompts as in training, takes options in two forms, and imports little."""

from concurrent.futures import ThreadPoolExecutor
import json
from pathlib import Path
import time

from command_line import run_python
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from grit_jax import GritLM, InputError, Sampling
from grit_jax.inference import compilation_notice
from grit_jax.inference.results import NotFiniteError
from grit_jax.text.examples import chat_text
from grit_jax.text.templates import EMBED, chat_prompt, embedding_prefix

TEXTS = ["A short one", "ünïcödé 🙂", "word " * 30]
USER = {"role": "user", "content": "Who are you?"}
TURNS = ["Hi!", " Hello. \n", "Who are you?", "A model."]
CHAT = [
    {"role": role, "content": turn}
    for role, turn in zip(("user", "assistant", "user"), TURNS, strict=False)
]


def test_queries_and_documents_are_embedded_with_the_markers_of_training(model):
    instruction = "Given a word, retrieve its meaning"
    np.testing.assert_array_equal(
        model.encode_query(TEXTS, instruction=f" {instruction}:\n"),
        model.encode(TEXTS, instruction=f"<|user|>\n{instruction}\n<|embed|>\n"),
    )
    np.testing.assert_array_equal(
        model.encode_query(TEXTS[0], max_length=20),
        model.encode(TEXTS[0], instruction="<|embed|>\n"),
    )
    documents = [{"title": "Title", "text": "The text"}, {"text": "Only text"}]
    texts = ["Title The text", "Only text"]
    for given in (documents, texts):
        np.testing.assert_array_equal(
            model.encode_document(given), model.encode(texts, instruction=EMBED)
        )
    found, caches = model.encode_document(documents[0], get_cache=True)
    expected = model.encode(texts[0], instruction=EMBED, get_cache=True)
    np.testing.assert_array_equal(found, expected[0])
    np.testing.assert_array_equal(caches[0].keys, expected[1][0].keys)
    np.testing.assert_array_equal(
        model.encode_document(texts, "Represent"),
        model.encode(texts, instruction=embedding_prefix("Represent")),
    )


def test_ready_made_instructions_of_queries_are_refused(model):
    with pytest.raises(InputError, match=r"has the marker <\|embed\|>, which is added for you"):
        model.encode_query("a", embedding_prefix("find"))
    with pytest.raises(InputError, match="instruction is of type list: give a string"):
        model.encode_document("a", [5, 6])


def text_of(model, ids):
    """Returns the text of generated tokens, with the space before a first word."""
    tokenizer = model.tokenizer
    return tokenizer.decode([*tokenizer.encode("a"), *ids.tolist()])[1:]


def test_a_chat_has_the_tokens_of_training(model):
    tokenizer = model.tokenizer
    prompt = [
        tokenizer.bos_id,
        *tokenizer.encode("<|user|>\nHi!\n<|assistant|>\nHello."),
        tokenizer.eos_id,
        *tokenizer.encode("\n<|user|>\nWho are you?\n<|assistant|>\n"),
    ]
    whole = chat_text(tokenizer, TURNS, 1000).tokens
    np.testing.assert_array_equal(whole[: len(prompt)], prompt)
    expected = text_of(model, model.generate(prompt, 8))
    assert model.chat(CHAT, 8) == expected
    assert "".join(model.stream_chat(CHAT, 8)) == expected
    # Without the end of the first answer, it is another prompt.
    del prompt[prompt.index(tokenizer.eos_id)]
    assert text_of(model, model.generate(prompt, 8)) != expected


@pytest.mark.slow
def test_chats_are_prompts_with_the_markers_written_by_hand(model):
    users = ["Who are you?", "Be brief.\n\nHm"]
    prompts = [chat_prompt(user, is_first=True) for user in users]
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hm"}]
    assert prompts[0] == "<|user|>\nWho are you?\n<|assistant|>\n"
    assert model.chat([[USER], system], 6) == model.generate(prompts, 6)
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    drawn = model.chat([[USER], system], 6, batch_size=1, **options)
    assert drawn == model.generate(prompts, 6, **options)
    assert model.chat(system, 6, first_index=1, **options) == drawn[1]
    assert "".join(model.stream_chat([USER], 6, **options)) == drawn[0]
    stop = drawn[0][len(drawn[0]) // 2 :][:3]
    assert model.chat([USER], 6, stop=stop, **options) == drawn[0][: drawn[0].index(stop)]


def test_a_chat_behind_a_cached_text(model):
    _, caches = model.encode_document(["The sea is salt."], get_cache=True)
    expected = model.generate("\n<|user|>\nWho are you?\n<|assistant|>\n", 6, cache=caches[0])
    assert model.chat([USER], 6, cache=caches[0]) == expected
    assert "".join(model.stream_chat([USER], 6, cache=caches)) == expected
    assert model.chat([[USER]], 6, cache=caches) == [expected]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list of"),
        ("Hi", "messages must be a list of"),
        ([[]], "chat 0 has no messages"),
        ([[USER], [USER, USER]], "chat 1: user and assistant do not alternate, .*: give a list of"),
        (["Hi"], "chat 0: 'messages' is not a list"),
        (CHAT[:2], "ends with a message of the assistant: the last message must be the user's"),
        (
            [USER, {"role": "system", "content": "a"}],
            "a system message is not followed by a user message",
        ),
        ([{"role": "user", "content": " "}], "chat 0: message 0 is empty"),
        ([{"role": "user", "content": "\ud83d"}], "chat 0 has half of a surrogate pair"),
    ],
)
def test_messages_that_cannot_be_answered_are_errors(model, messages, message):
    with pytest.raises(InputError, match=message):
        model.chat(messages)


def test_a_stream_is_of_one_chat_and_errors_come_at_once(model):
    with pytest.raises(InputError, match="stream_chat takes one chat, not 2"):
        model.stream_chat([[USER], [USER]])
    with pytest.raises(InputError, match="max_new_tokens=0 must be an integer"):
        model.stream_chat([USER], 0)


def test_sampling_options_are_keywords_or_one_object(model):
    options = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2}
    expected = model.generate("One", 8, seed=2, **options)
    sampling = Sampling(**options)
    assert model.generate("One", 8, seed=2, sampling=sampling) == expected
    assert "".join(model.stream("One", 8, seed=2, sampling=sampling)) == expected
    assert model.chat([USER], 6, sampling=sampling) == model.chat([USER], 6, **options)
    greedy = model.generate("One", 8)
    assert model.generate("One", 8, sampling=Sampling()) == greedy != expected
    assert model.generate("One", 8, sampling=Sampling(temperature=0.0)) == greedy
    words = "sampling= and temperature=, top_k= were both given: put all options into sampling"
    for call in (model.generate, model.stream):
        with pytest.raises(ValueError, match=words):
            call("One", 8, sampling=sampling, temperature=0.7, top_k=3)
    with pytest.raises(TypeError, match="top_q"):
        model.stream("One", 8, top_q=0.9)


def test_arguments_of_other_packages_are_taken_if_they_mean_the_same(model):
    expected = model.encode(TEXTS, instruction=EMBED)
    theirs = {"convert_to_numpy": True, "show_progress_bar": False, "normalize_embeddings": True}
    for found in (
        model.encode(sentences=TEXTS, prompt=EMBED, **theirs),
        model.unnormalized().encode(TEXTS, instruction=EMBED, **theirs),
        model.encode_document(sentences=TEXTS, **theirs),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    greedy, options = model.generate("One", 8), {"temperature": 0.7, "top_p": 0.9, "seed": 2}
    assert model.generate("One", max_tokens=8, do_sample=False, pad_token_id=2) == greedy
    drawn = model.generate("One", 8, **options)
    assert model.generate("One", 8, do_sample=True, num_return_sequences=1, **options) == drawn
    assert "".join(model.stream("One", 8, do_sample=True, **options)) == drawn != greedy
    assert model.chat([USER], 6, do_sample=False) == model.chat([USER], 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: GritLM("GritLM/GritLM-7B", torch_dtype="auto"),
         r"call GritLM.from_pretrained\('GritLM/GritLM-7B'\)"),
        (lambda model: GritLM(Path("folder")), r"call GritLM.from_pretrained\('folder'\)"),
        (lambda model: GritLM.from_pretrained("nowhere", torch_dtype="auto"),
         "dtype='auto' must be 'bfloat16' or 'float32'"),
        (lambda model: GritLM.from_pretrained("nowhere", device_map="cuda:0"),
         "no argument device_map='cuda:0': weights are split over all devices"),
        (lambda model: model.encode("a", prompt_name="query"),
         "encode has no argument prompt_name='query': call encode_query"),
        (lambda model: model.encode("a", precision="int8"), "precision='int8': quantize"),
        (lambda model: model.encode(["a"], sentences=["a"], texts=["a"]), "pass one"),
        (lambda model: model.encode_query("a", prompt=EMBED), "pass instruction= in plain words"),
        (lambda model: model.generate("a", max_length=9), "max_length=9: pass max_new_tokens"),
        (lambda model: model.generate("a", num_beams=4), "num_beams=4: there is no beam search"),
        (lambda model: model.chat([USER], attention_mask=np.ones((1, 3))), "without padding"),
    ],
)  # fmt: skip
def test_other_arguments_of_other_packages_are_explained(model, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(model)
    assert len(str(caught.value).splitlines()) == 1


def test_types_of_other_packages_are_dtypes(model):
    from grit_jax.inference.gritlm import _dtype_name

    for dtype in ("bfloat16", jnp.bfloat16, torch.bfloat16, jnp.dtype("bfloat16")):
        assert _dtype_name(dtype) == "bfloat16"
    assert _dtype_name(torch.float32) == _dtype_name(np.float32) == "float32"


def test_output_that_is_not_finite_names_the_first_text(model):
    graph, state = nnx.split(model.model)
    damaged = nnx.merge(graph, jax.tree.map(lambda weights: weights.at[..., 0].set(jnp.nan), state))
    damaged = GritLM(damaged, model.mesh, model.tokenizer)
    for call, name in (
        (lambda: damaged.encode(TEXTS), "text 0"),
        (lambda: damaged.score(["a", "b"], ["c", "d"]), "continuation 0"),
        (lambda: damaged.generate(["a", "b"], 4), "prompt 0"),
        (lambda: list(damaged.stream("a", 4)), "prompt 0"),
        (lambda: damaged.chat([USER], 4, temperature=1.0, top_p=0.5), "prompt 0"),
    ):
        with pytest.raises(NotFiniteError, match=f"output for {name} is not finite"):
            call()


def test_a_slow_compilation_is_announced_once(capfd, monkeypatch):
    monkeypatch.setattr(compilation_notice, "NOTICE_SECONDS", 0.05)
    notice = compilation_notice.CompilationNotice()
    for seconds in (0.5, 0.5, 0):
        with notice.around("embeds 1 x 64 tokens"):
            time.sleep(seconds)
    with notice.around("embeds 8 x 64 tokens"):
        pass
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "compiling the program that embeds 1 x 64 tokens" in lines[0]


def test_threads_get_what_one_after_the_other_gets(model):
    """On one device, as the docstring of `GritLM` says."""
    fresh = GritLM(model.model, model.mesh, model.tokenizer)

    def use(number):
        embedding = fresh.encode_query(TEXTS[number % 3], max_length=64)
        return embedding.tolist(), fresh.generate("One " * (1 + number % 3), 4)

    with ThreadPoolExecutor(6) as executor:
        found = list(executor.map(use, range(12)))
    assert found == [use(number) for number in range(12)]


# Records which module imports which: flax.nnx imports optax itself, so sys.modules cannot tell.
IMPORTS = """
import builtins, importlib, json, sys

own_import, own_import_module = builtins.__import__, importlib.import_module
imports = []

def recorded(name, globals=None, locals=None, fromlist=(), level=0):
    imports.append(((globals or {}).get("__name__") or "", name))
    return own_import(name, globals, locals, fromlist, level)

def recorded_module(name, package=None):
    imports.append((sys._getframe(1).f_globals.get("__name__") or "", name))
    return own_import_module(name, package)

builtins.__import__, importlib.import_module = recorded, recorded_module
from grit_jax import GritLM
print(json.dumps([imports, sorted(sys.modules)]))
"""


def test_a_model_is_imported_without_trainer_and_optional_packages(tmp_path):
    finished = run_python(IMPORTS, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    imports, modules = json.loads(finished.stdout.splitlines()[-1])
    assert "grit_jax.inference.gritlm" in modules
    assert ("grit_jax.inference.gritlm", "jax") in map(tuple, imports)
    for package in ("tensorflow", "seqio", "torch", "transformers"):
        assert package not in modules
    for name in ("training", "prepare", "rag", "evaluation", "planning"):
        assert not [module for module in modules if module.startswith(f"grit_jax.{name}")], name
    ours = [name for importer, name in imports if importer.split(".")[0] == "grit_jax"]
    assert not [name for name in ours if name.split(".")[0] == "optax"]


def test_public_names_are_imported_from_the_package():
    import grit_jax

    for name in grit_jax.__all__:
        assert getattr(grit_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = grit_jax.Trainer
