"""Answers from an index: every cache mode, against one forward pass in transformers."""

import dataclasses
import io
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

from command_line import assert_fails_in_one_line, grit_jax, grit_jax_in_process
import numpy as np
import pytest

from grit_jax import GritLM
from grit_jax.conversion import HuggingFaceModel
from grit_jax.conversion.export import write_hugging_face
from grit_jax.inference.cache_utils import concat_caches, rotate_keys
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.models import make_config, make_model
from grit_jax.rag import pipeline as pipeline_module
from grit_jax.rag.command import run
from grit_jax.rag.index import DocumentIndex, build_index
from grit_jax.rag.pipeline import CACHE_MODES, PAPER_PROMPT, RagPipeline
from grit_jax.text.templates import EMBED, embedding_prefix

DOCUMENTS = [
    {"title": "The sea", "text": "is salt, wide and deep, and nobody owns it."},
    {"text": "A compiler turns a program into another one. " * 4},
    {"text": "Bread is made of flour, water and time."},
]
# The prompts of the paper, from its appendix on RAG.
AFTER_QUERY = "Optionally using the prior context answer the query prior to it\n<|assistant|>\n"
AFTER_DOCUMENT = (
    "Answer the prior query while optionally using the context prior to it\n<|assistant|>\n"
)
PROMPTS = {
    "query-prompt": f"<|user|>\n{{query}}\n\n{{documents}}\n\n{AFTER_QUERY}",
    "document-prompt": f"<|user|>\n{{documents}}\n\n{{query}}\n\n{AFTER_DOCUMENT}",
    "query-cache": f"\n<|user|>\n{{documents}}\n\n{AFTER_QUERY}",
    "document-cache": f"\n<|user|>\n{{query}}\n\n{AFTER_DOCUMENT}",
    "query-document-cache": f"\n<|user|>\n{AFTER_QUERY}",
    "document-query-cache": f"\n<|user|>\n{AFTER_DOCUMENT}",
}
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


@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_rotated_keys_are_those_of_later_positions(model, architecture):
    module = model.model
    if architecture == "gemma3":
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
        sizes = {name: getattr(module.config, name) for name in sizes}
        windows = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 8}
        module = make_model(make_config("gemma3", **sizes, **windows), seed=0)
    tokens = np.arange(5, 25)[None]

    def keys(first):
        cache = module.make_cache(1, 20)
        positions = first + np.arange(20)[None]
        return module(tokens, positions, is_causal=False, cache=cache)[1].keys

    found = rotate_keys(np.asarray(keys(0)), 37, module.config.layer_rotary_frequencies())
    np.testing.assert_allclose(found, keys(37), atol=2e-5)


def paper(model, index, cache_mode="document-cache", num_documents=1, **options):
    """A pipeline with the settings of the paper."""
    options = {"num_documents": num_documents, "prompt": PAPER_PROMPT, **options}
    return RagPipeline(model, index, cache_mode, **options)


@pytest.mark.parametrize("cache_mode", CACHE_MODES)
def test_answers_do_not_depend_on_what_is_asked_beside(index, model, cache_mode):
    pipeline = RagPipeline(model, index, cache_mode, num_documents=2)
    together = pipeline.ask(QUESTIONS, 16)
    alone = [pipeline.ask(question, 16)[0] for question in QUESTIONS]
    assert [each.answer for each in together] == [each.answer for each in alone]
    embeddings = model.encode(QUESTIONS, instruction=EMBED)
    scores, positions = index.search(embeddings, 2)
    for answer, own_scores, own_positions in zip(together, scores, positions, strict=True):
        expected = [index.documents[position] for position in own_positions]
        assert [source.document for source in answer.sources] == expected
        found = [source.score for source in answer.sources]
        np.testing.assert_allclose(found, own_scores, atol=1e-5)


@pytest.mark.parametrize("cache_mode", CACHE_MODES)
def test_the_prompts_of_the_paper(index, model, cache_mode):
    """Caches and texts, combined by hand."""
    (answered,) = paper(model, index, cache_mode, 2).ask(QUESTIONS[0], 8)
    documents = [source.document for source in answered.sources]
    texts = [f"{d['title']} {d['text']}" if "title" in d else d["text"] for d in documents]
    _, (query,) = model.encode(QUESTIONS[:1], instruction=EMBED, get_cache=True)
    _, caches = model.encode(texts, instruction=EMBED, get_cache=True)
    cached = {"query": [query], "document": caches}
    names = cache_mode.removesuffix("-cache").split("-") if "cache" in cache_mode else []
    parts = [cache for name in names for cache in cached[name]]
    frequencies = model.model.config.layer_rotary_frequencies()
    cache = concat_caches(parts, frequencies, continue_positions=True) if parts else None
    prompt = PROMPTS[cache_mode].format(query=QUESTIONS[0], documents="\n\n".join(texts))
    assert answered.answer == model.generate(f"{prompt}The answer is", 8, cache=cache)


def test_by_default_numbered_documents_precede_the_question(tmp_path, model):
    build_index(model, DOCUMENTS, tmp_path / "bare")
    bare = DocumentIndex(tmp_path / "bare", model)
    pipeline = RagPipeline(model, bare, system="Be brief.")
    (answered,) = pipeline.ask(QUESTIONS[0], 8)
    texts = [source.document["text"] for source in answered.sources]
    assert sorted(texts) == sorted(document["text"] for document in DOCUMENTS)
    texts = [f"The sea {text}" if text.startswith("is salt") else text for text in texts]
    numbered = "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1))
    content = (
        f"{numbered}\n\n{QUESTIONS[0]}\n\nAnswer the question from the documents above. If they do "
        "not contain the answer, say that you do not know."
    )
    system = {"role": "system", "content": "Be brief."}
    messages = [system, {"role": "user", "content": content}]
    assert answered.answer == model.chat(messages, 8)
    sources, pieces = pipeline.stream(QUESTIONS[0], 8)
    assert sources == answered.sources and "".join(pieces) == answered.answer
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (following,) = pipeline.ask(QUESTIONS[0], 8, history=turns)
    assert following.sources == answered.sources
    assert following.answer == model.chat([system, *turns, *messages[1:]], 8)


def test_questions_are_embedded_with_the_stored_instruction(tmp_path, model):
    trained = GritLM(model.model, model.mesh, model.tokenizer)
    prompt = embedding_prefix("Given a question, find its answer")
    trained.embedding_spec = dataclasses.replace(model.embedding_spec, query_prompt=prompt)
    build_index(trained, DOCUMENTS, tmp_path / "model's")
    build_index(trained, DOCUMENTS, tmp_path / "given", query_instruction="Find the text")
    build_index(model, DOCUMENTS, tmp_path / "none")
    for name, options, instruction in (
        ("model's", {}, prompt),
        ("given", {}, embedding_prefix("Find the text")),
        ("none", {}, prompt),
        ("given", {"instruction": "Search"}, embedding_prefix("Search")),
        ("given", {"instruction": ""}, EMBED),
    ):
        index = DocumentIndex(tmp_path / name, trained)
        (answered,) = RagPipeline(trained, index, **options).ask(QUESTIONS[0], 1)
        query = model.encode(QUESTIONS[:1], instruction=instruction)
        found = [source.score for source in answered.sources]
        np.testing.assert_allclose(found, index.search(query, 3)[0][0], atol=1e-5)


@pytest.mark.slow
def test_as_many_documents_and_messages_are_used_as_fit(tmp_path, model):
    documents = [{"text": f"{word} " * 220} for word in ("sea", "salt", "river")]
    build_index(model, documents, tmp_path / "index", caches="float32")
    index = DocumentIndex(tmp_path / "index", model)
    turns = [
        {"role": "user", "content": "sea " * 90},
        {"role": "assistant", "content": "salt " * 90},
    ]
    for mode in ("document-cache", "document-prompt"):
        pipeline = RagPipeline(model, index, mode)
        with pytest.warns(UserWarning, match="question 0: only 2 of 3 documents and the last 0 of"):
            (answered,) = pipeline.ask("Who?", 4)
        (expected,) = RagPipeline(model, index, mode, num_documents=2).ask("Who?", 4)
        assert answered == expected
        with pytest.warns(UserWarning, match="only 1 of 3 documents and the last 4 of 6 earlier"):
            pipeline.ask("Who?", 4, history=turns * 3)
        with pytest.raises(InputError, match="tokens with its nearest document, which with max_n"):
            pipeline.ask("Who?", 600)


def test_without_stored_caches_they_are_made_on_the_way(tmp_path, index, model):
    build_index(model, DOCUMENTS, tmp_path / "bare")
    bare = DocumentIndex(tmp_path / "bare", model)
    made, stored = (paper(model, each).ask(QUESTIONS, 16) for each in (bare, index))
    assert [each.answer for each in made] == [each.answer for each in stored]


def test_answers_do_not_change_where_few_are_asked_at_once(index, model, monkeypatch):
    pipeline = paper(model, index, "query-document-cache")
    questions = [*QUESTIONS, QUESTIONS[0], "What is salt?", "Who?"]
    expected = [pipeline.ask(question, 16)[0] for question in questions]
    calls, read = [], []
    chat, cache_of = model.chat, index.cache_of

    def counted_chat(chats, *arguments, **options):
        calls.append((len(chats), options["first_index"]))
        return chat(chats, *arguments, **options)

    def counted_cache_of(number):
        read.append(number)
        return cache_of(number)

    monkeypatch.setattr(pipeline_module, "BATCH_SIZE", 2)
    monkeypatch.setattr(model, "chat", counted_chat)
    monkeypatch.setattr(index, "cache_of", counted_cache_of)
    found = pipeline.ask(questions, 16)
    assert [one.answer for one in found] == [one.answer for one in expected]
    positions = [index.documents.index(one.sources[0].document) for one in found]
    assert positions == [index.documents.index(one.sources[0].document) for one in expected]
    # The last batch is padded to the size of the others, and the indices for sampling continue.
    assert calls == [(2, 0), (2, 2), (2, 4)]
    each_once = [{*positions[:2]}, {*positions[2:4]}, {positions[4]}]
    assert sorted(read) == sorted(number for some in each_once for number in some)


@pytest.mark.filterwarnings("ignore:1 of 1 texts were truncated to 64 tokens")
def test_a_document_that_was_cut_is_read_as_it_was_embedded(tmp_path, model):
    documents = [{"text": "word " * 900}]
    answers = []
    for caches in ("float32", None):
        folder = tmp_path / str(caches)
        build_index(model, documents, folder, caches=caches, max_length=64, truncate=True)
        answers += paper(model, DocumentIndex(folder, model)).ask("What is it?", 8)
    assert answers[0].answer == answers[1].answer


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
    pipeline = paper(ours, index, "query-document-cache", 2, positions=positions)
    (answered,) = pipeline.ask(QUESTIONS[0], 8)

    def ids(text):
        return [ours.tokenizer.bos_id, *ours.tokenizer.encode(EMBED + text)]

    texts = [source.document for source in answered.sources]
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
    pipeline = paper(model, DocumentIndex(tmp_path / "index", model), "document-prompt")
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
    with pytest.raises(InputError, match="num_documents=0 must be an integer of at least 1"):
        RagPipeline(model, index, num_documents=0)
    with pytest.raises(InputError, match=r"4 documents were requested, but .* has 3"):
        index.search(model.encode(QUESTIONS), 4)
    with pytest.raises(InputError, match="puts the question before the conversation"):
        RagPipeline(model, index, "query-cache").ask("Who?", history=[{"role": "user"}])
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
    with pytest.raises(InputError, match=r"question 2 has [67]\d\d tokens with its nearest docu"):
        RagPipeline(model, index).ask([*QUESTIONS, "b " * 650], 16)


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
    assert "index: 3 documents added" in built.stdout
    asked = grit_jax("rag", "ask", folder, "--index=index", "--paper", *QUESTIONS, cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    for question in QUESTIONS:
        assert f"{question}\nThe answer is" in asked.stdout
    wrong = grit_jax("rag", "ask", folder, "--index=other", "Who?", cwd=tmp_path)
    assert_fails_in_one_line(wrong, "other is not an index: run grit-jax rag build")


def test_answers_are_printed_with_their_sources(tmp_path, model, monkeypatch):
    monkeypatch.setattr("grit_jax.inference.model_options.load_model", lambda _: model)
    documents = [
        {**document, "id": number, "url": f"https://a/{number}", "tags": ["x", {"y": None}]}
        for number, document in enumerate(DOCUMENTS)
    ]
    build_index(model, documents, tmp_path / "index")
    pipeline = RagPipeline(model, DocumentIndex(tmp_path / "index", model))
    expected = pipeline.ask(QUESTIONS, 8)

    def ask(*arguments, lines=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        command = ("rag", "ask", "model", "--index=index", "--max-new-tokens=8")
        asked = grit_jax_in_process(*command, *arguments, cwd=tmp_path)
        assert asked.returncode == 0, asked.stderr
        return asked.stdout

    shown = ask(*QUESTIONS)
    for question, answer in zip(QUESTIONS, expected, strict=True):
        assert f"{question}\n{answer.answer}\n  [1] {answer.sources[0].score:.3f}  " in shown
    assert "The sea  (id 0)  https://a/0" in shown
    lines = "".join(f"{question}\n\n" for question in QUESTIONS)
    assert ask("-", "--stream", lines=lines) == shown
    for text in (ask("--json", *QUESTIONS), ask("-", "--json", lines=lines)):
        objects = [json.loads(line) for line in text.splitlines()]
        assert [one["question"] for one in objects] == QUESTIONS
        assert [one["answer"] for one in objects] == [one.answer for one in expected]
        for one, answer in zip(objects, expected, strict=True):
            for found, source in zip(one["documents"], answer.sources, strict=True):
                assert found["document"] == source.document == documents[int(found["id"])]
                np.testing.assert_allclose(found["score"], source.score, atol=1e-5)
    history = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": expected[0].answer},
    ]
    (second,) = pipeline.ask(QUESTIONS[1], 8, history=history)
    conversation = ask("-", "--chat", "--json", lines=lines)
    answers = [json.loads(line)["answer"] for line in conversation.splitlines()]
    assert answers == [expected[0].answer, second.answer]
    assert f"{QUESTIONS[1]}\n{second.answer}\n" in ask("--chat", *QUESTIONS)
    assert "\nThe answer is" in ask("--paper", "--max-new-tokens=2", "Who?")
    assert_fails_in_one_line(
        grit_jax_in_process("rag", "ask", "model", "--index=index", "-", cwd=tmp_path),
        "no questions were given",
    )
