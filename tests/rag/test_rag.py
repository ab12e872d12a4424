"""Answers from an index: every cache mode, against one forward pass in transformers."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

from command_line import assert_fails_in_one_line, grit_jax
import numpy as np
import pytest

from grit_jax import GritLM
from grit_jax.conversion import HuggingFaceModel
from grit_jax.conversion.export import write_hugging_face
from grit_jax.inference.cache_utils import rotate_keys
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.rag import pipeline as pipeline_module
from grit_jax.rag.command import run
from grit_jax.rag.index import DocumentIndex, build_index
from grit_jax.rag.pipeline import CACHE_MODES, PROMPTS, RagPipeline
from grit_jax.text.templates import EMBED

DOCUMENTS = [
    {"title": "The sea", "text": "is salt, wide and deep, and nobody owns it."},
    {"text": "A compiler turns a program into another one. " * 4},
    {"text": "Bread is made of flour, water and time."},
]
QUESTIONS = ["Who owns the sea?", "What is bread made of, if one has all the time in the world?"]


@pytest.fixture
def index(tmp_path, model):
    build_index(model, DOCUMENTS, tmp_path / "index", caches="float32")
    return DocumentIndex(tmp_path / "index", model)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of transformers, and the folder it was exported to."""
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    config = MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(folder / "saved")
    write_hugging_face(HuggingFaceModel(folder / "saved"), folder / "exported")
    return theirs, folder / "exported"


def test_rotated_keys_are_those_of_later_positions(model):
    module = model.model
    tokens = np.arange(5, 25)[None]

    def keys(first):
        cache = module.make_cache(1, 20)
        positions = first + np.arange(20)[None]
        return module(tokens, positions, is_causal=False, cache=cache)[1].keys

    found = rotate_keys(np.asarray(keys(0)), 37, module.config.rope_theta)
    np.testing.assert_allclose(found, keys(37), atol=2e-5)


@pytest.mark.parametrize("cache_mode", CACHE_MODES)
def test_answers_do_not_depend_on_what_is_asked_beside(index, model, cache_mode):
    pipeline = RagPipeline(model, index, cache_mode)
    together = pipeline.ask(QUESTIONS)
    alone = [pipeline.ask(question)[0] for question in QUESTIONS]
    assert [each.answer for each in together] == [each.answer for each in alone]
    embeddings = model.encode(QUESTIONS, instruction=EMBED)
    scores, numbers = index.search(embeddings)
    assert [each.document_ids for each in together] == numbers.tolist()
    np.testing.assert_allclose([each.scores for each in together], scores, atol=1e-5)


def test_without_stored_caches_they_are_made_on_the_way(tmp_path, index, model):
    build_index(model, DOCUMENTS, tmp_path / "bare")
    bare = DocumentIndex(tmp_path / "bare", model)
    made, stored = RagPipeline(model, bare).ask(QUESTIONS), RagPipeline(model, index).ask(QUESTIONS)
    assert [each.answer for each in made] == [each.answer for each in stored]


def test_answers_do_not_change_where_few_are_asked_at_once(index, model, monkeypatch):
    pipeline = RagPipeline(model, index, "query-document-cache")
    questions = [*QUESTIONS, QUESTIONS[0], "What is salt?", "Who?"]
    expected = [pipeline.ask(question)[0] for question in questions]
    calls, read = [], []
    generate, cache_of = model.generate, index.cache_of

    def counted_generate(prompts, *arguments, **options):
        calls.append((len(prompts), options["first_index"]))
        return generate(prompts, *arguments, **options)

    def counted_cache_of(number):
        read.append(number)
        return cache_of(number)

    monkeypatch.setattr(pipeline_module, "BATCH_SIZE", 2)
    monkeypatch.setattr(model, "generate", counted_generate)
    monkeypatch.setattr(index, "cache_of", counted_cache_of)
    found = pipeline.ask(questions)
    assert [one.answer for one in found] == [one.answer for one in expected]
    assert [one.document_ids for one in found] == [one.document_ids for one in expected]
    # The last batch is padded to the size of the others, and the indices for sampling continue.
    assert calls == [(2, 0), (2, 2), (2, 4)]
    near = [one.document_ids[0] for one in found]
    each_once = [{*near[:2]}, {*near[2:4]}, {near[4]}]
    assert sorted(read) == sorted(number for some in each_once for number in some)


@pytest.mark.filterwarnings("ignore:1 of 1 texts were truncated to 64 tokens")
def test_a_document_that_was_cut_is_read_as_it_was_embedded(tmp_path, model):
    documents = [{"text": "word " * 900}]
    answers = []
    for caches in ("float32", None):
        folder = tmp_path / str(caches)
        build_index(model, documents, folder, caches=caches, max_length=64, truncate=True)
        answers += RagPipeline(model, DocumentIndex(folder, model)).ask("What is it?", 8)
    assert answers[0].answer == answers[1].answer


def test_a_cache_replaces_its_text(index, model):
    """The document's cache and the question's text, combined by hand."""
    (answered,) = RagPipeline(model, index, "document-cache").ask(QUESTIONS[0])
    document = DOCUMENTS[answered.document_ids[0]]
    _, (cache,) = model.encode_corpus([document], instruction=EMBED, get_cache=True)
    prompt = PROMPTS["document-cache"].replace("{query}", QUESTIONS[0]) + "The answer is"
    assert answered.answer == model.generate(prompt, 16, cache=cache)


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["continued", "restarted"])
def test_joined_caches_are_a_text_whose_parts_are_apart(tmp_path, exported, positions):
    """In transformers: one forward pass over all tokens, with mask and positions made by hand."""
    import torch

    theirs, exported = exported
    # Causal attention everywhere, as in transformers.
    ours = GritLM.from_pretrained(exported, dtype="float32", attention="cccc")
    build_index(ours, DOCUMENTS, tmp_path / "index", caches="float32")
    index = DocumentIndex(tmp_path / "index", ours)
    pipeline = RagPipeline(
        ours, index, "query-document-cache", num_documents=2, positions=positions
    )
    (answered,) = pipeline.ask(QUESTIONS[0], 8)

    def ids(text):
        return [ours.tokenizer.bos_id, *ours.tokenizer.encode(EMBED + text)]

    texts = [index.documents[number] for number in answered.document_ids]
    texts = [f"{d['title']} {d['text']}" if "title" in d else d["text"] for d in texts]
    blocks = [ids(text) for text in [QUESTIONS[0], *texts]]
    prompt = ours.tokenizer.encode(PROMPTS["query-document-cache"] + "The answer is")
    tokens = [token for block in blocks for token in block] + prompt
    block_of = np.repeat([0, 1, 2, 3], [*map(len, blocks), len(prompt)])
    position_ids = np.arange(len(tokens))
    if positions == "restarted":
        starts = np.cumsum([0, *map(len, blocks)])[:3]
        before = position_ids < len(tokens) - len(prompt)
        position_ids = np.where(
            before, position_ids - starts[np.minimum(block_of, 2)], position_ids
        )
    for _ in range(8):
        attends = np.tril(np.ones((len(tokens), len(tokens)), bool))
        attends &= (block_of[:, None] == block_of) | (block_of[:, None] == 3)
        mask = torch.where(torch.tensor(attends), 0.0, torch.finfo(torch.float32).min)[None, None]
        logits = theirs(
            torch.tensor([tokens]),
            attention_mask=mask,
            position_ids=torch.tensor(position_ids[None]),
        ).logits
        tokens.append(int(logits[0, -1].argmax()))
        block_of, position_ids = (
            np.append(block_of, 3),
            np.append(position_ids, position_ids[-1] + 1),
        )
    assert (
        answered.answer
        == ours.tokenizer.decode(prompt + tokens[-8:])[len(ours.tokenizer.decode(prompt)) :]
    )


def test_braces_in_a_document_are_text(tmp_path, model):
    build_index(model, [{"text": "Write {query} in braces {documents}."}], tmp_path / "index")
    pipeline = RagPipeline(model, DocumentIndex(tmp_path / "index", model), "document-prompt")
    (answer,) = pipeline.ask("Who?", 4)
    prompt = (
        "<|user|>\nWrite {query} in braces {documents}.\n\nWho?\n\nAnswer the prior query while "
        "optionally using the context prior to it\n<|assistant|>\nThe answer is"
    )
    assert answer.answer == model.generate(prompt, 4)


def test_what_cannot_be_asked_is_named(index, model, monkeypatch):
    with pytest.raises(InputError, match="cache_mode='fast' must be one of query-prompt"):
        RagPipeline(model, index, "fast")
    with pytest.raises(InputError, match="positions='kept' must be"):
        RagPipeline(model, index, positions="kept")
    with pytest.raises(InputError, match=r"4 documents were requested, but .* has 3"):
        RagPipeline(model, index, num_documents=4).ask(QUESTIONS)
    for questions, words in {
        (): "no questions were given",
        ("",): "question 0 is empty",
        ("a", "\ud83d"): "question 1 has half of a surrogate pair",
        (
            "a",
            "b " * 800,
        ): "question 1 has 8.. tokens, instruction included, but this model supports",
    }.items():
        with pytest.raises(InputError, match=words):
            RagPipeline(model, index).ask(questions)
    monkeypatch.setattr(pipeline_module, "BATCH_SIZE", 2)
    with pytest.raises(InputError, match=r"prompt 2 has 6\d\d tokens after"):
        RagPipeline(model, index).ask([*QUESTIONS, "b " * 650])


def test_documents_and_index_are_looked_for_before_the_model(tmp_path):
    command = ["build", "no_model", str(tmp_path / "typo"), "--index", str(tmp_path / "index")]
    with pytest.raises(InputError, match="typo does not exist: give a folder"):
        run(command)
    assert not (tmp_path / "index").exists()
    with pytest.raises(InputError, match="index is not an index: run grit-jax rag build"):
        run(["ask", "no_model", "Who?", "--index", str(tmp_path / "index")])


def test_unknown_choices_of_a_model_are_named_before_it_is_loaded(capsys):
    for option in ("--attention", "--pooling"):
        with pytest.raises(SystemExit):
            run(["ask", "no_model", "--index=index", "Who?", option, "max"])
        assert f"argument {option}: invalid choice: 'max'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_builds_an_index_and_answers(tmp_path, exported):
    _, folder = exported
    lines = "".join(json.dumps(document) + "\n" for document in DOCUMENTS)
    (tmp_path / "documents.jsonl").write_text(lines)
    built = grit_jax(
        "rag", "build", folder, "documents.jsonl", "--index=index", "--caches=int8",
        cwd=tmp_path,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert "3 documents added to index" in built.stdout
    asked = grit_jax("rag", "ask", folder, "--index=index", *QUESTIONS, cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    for question in QUESTIONS:
        assert f"{question}\nThe answer is" in asked.stdout
    wrong = grit_jax("rag", "ask", folder, "--index=other", "Who?", cwd=tmp_path)
    assert_fails_in_one_line(wrong, "other is not an index: run grit-jax rag build")
