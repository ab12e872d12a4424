"""Documents of an index are replaced and deleted by ID, also if a change is interrupted."""

import contextlib
import dataclasses
import json
from pathlib import Path
import shutil
import tempfile

from command_line import assert_fails_in_one_line, grit_jax_in_process
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from grit_jax import GritLM
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.inference.results import NotFiniteError
from grit_jax.models import make_model
from grit_jax.rag import index as index_module
from grit_jax.rag import index_folder
from grit_jax.rag.documents import document_id, text_hash
from grit_jax.rag.index import DocumentIndex, build_index, delete_documents
from grit_jax.rag.index_folder import DocumentIndexError
from grit_jax.text.templates import EMBED, embedding_prefix
from grit_jax.text.tokenizer import Tokenizer

TEXTS = ("sea and salt", "bread of flour", "a lamp of glass")
DOCUMENTS = [
    {"id": f"d{i}", "text": f"{TEXTS[i % 3]} {i}", "title": "t", "url": f"https://a/{i}"}
    for i in range(7)
]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(index_module, "BATCH_SIZE", 2)
    monkeypatch.setattr(index_module, "BATCH_SIZE_WITH_CACHES", 2)
    monkeypatch.setattr(index_module, "PART_DOCUMENTS", 3)


def contents(folder, model):
    """The documents of an index by ID."""
    documents = DocumentIndex(folder, model).documents
    found = {document_id(document): document for document in documents}
    assert len(found) == len(documents)
    return found


def test_documents_are_replaced_and_deleted_by_id(tmp_path, model):
    folder = tmp_path / "index"
    assert build_index(model, DOCUMENTS, folder).added == 7
    nested = {"id": 8, "text": "river", "metadata": {"tags": ["a", None], "size": 1.5}}
    changed = [{**DOCUMENTS[4], "text": "stone"}, {**DOCUMENTS[1], "url": "https://b"}, nested]
    update = build_index(model, [*DOCUMENTS[:2], *changed], folder)
    assert dataclasses.astuple(update) == (1, 2, 2, 0, 1)  # "d1" was twice in this call.
    index = DocumentIndex(folder, model)
    expected = [*(DOCUMENTS[i] for i in (0, 2, 3, 5, 6)), *changed]
    assert sorted(index.documents, key=str) == sorted(expected, key=str)
    query = model.encode(["t stone"], instruction=EMBED)
    scores, positions = index.search(query, len(index))
    embeddings = model.encode_corpus(index.documents, instruction=EMBED)
    np.testing.assert_allclose(scores, np.sort(query @ embeddings.T)[:, ::-1], atol=1e-5)
    assert index.documents[positions[0, 0]] == changed[0]
    with pytest.raises(DocumentIndexError, match=r"no document with the ID 'x' and 1 more: noth"):
        delete_documents(folder, ["d0", "x", "y"])
    with pytest.raises(InputError, match="ids are of type str: give a list of IDs"):
        delete_documents(folder, "d0")
    assert delete_documents(folder, ["d0", "8", "d0"]) == 2
    assert contents(folder, model).keys() == {"d1", "d2", "d3", "d4", "d5", "d6"}
    stored = "".join(path.read_text() for path in folder.glob("part-*/documents.jsonl"))
    assert "river" not in stored and "salt 0" not in stored, "deleted texts must leave the disk"
    assert build_index(model, DOCUMENTS[:1], folder).added == 1
    assert delete_documents(folder, list(contents(folder, model))) == 7
    assert len(DocumentIndex(folder, model)) == 0
    assert build_index(model, DOCUMENTS, folder).added == 7


def test_documents_without_id_are_identified_by_their_text(tmp_path, model):
    folder, document = tmp_path / "index", {"text": "one", "url": "a"}
    assert build_index(model, [document, {"_id": "b", "text": "two"}], folder).added == 2
    update = build_index(model, [{**document, "url": "b"}, {"id": "b", "text": "2"}], folder)
    assert update.replaced == 2
    # A copy with an ID replaces the one without.
    assert build_index(model, [{"id": "c", "text": "one"}, document], folder).replaced == 1
    assert contents(folder, model).keys() == {"b", "c", text_hash(document)}
    assert delete_documents(folder, [text_hash(document)]) == 1


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"id": ""}, r"document 1: 'id' is ''|document 1 .*: 'id' is ''"),
        ({"id": [1]}, "'id' is .1.: give a string or an integer"),
        ({"_id": True}, "'_id' is True: give a string or an integer"),
        ({"when": {1, 2}}, "document 1 has a field that JSON cannot represent"),
    ],
)
def test_invalid_fields_are_named(tmp_path, model, field, words):
    with pytest.raises(InputError, match=words):
        build_index(model, [DOCUMENTS[0], {"text": "a", **field}], tmp_path / "index")


documents = st.builds(
    lambda key, text, value: {**({} if key is None else {"id": key}), "text": text, "v": value},
    st.sampled_from([None, "a", "b", "c", 4]),
    st.sampled_from(TEXTS),
    st.sampled_from([0, 1]),
)
changes = st.one_of(
    st.lists(documents, max_size=7), st.sets(st.sampled_from(["a", "b", "c", "4"]), min_size=1)
)


@given(sequence=st.lists(changes, min_size=2, max_size=6))
@settings(max_examples=20)
def test_any_sequence_of_changes_is_that_of_a_dictionary(model, sequence):
    expected = {}
    with tempfile.TemporaryDirectory() as folder:
        build_index(model, [], folder, caches="int8")
        for change in sequence:
            if isinstance(change, set):
                if ids := change & expected.keys():
                    assert delete_documents(folder, sorted(ids)) == len(ids)
                expected = {key: value for key, value in expected.items() if key not in ids}
            else:
                build_index(model, change, folder, caches="int8")
                for document in change:
                    # `text_hash` is the key of a copy without an ID.
                    expected.pop(text_hash(document), None)
                    expected[document_id(document)] = document
            assert contents(folder, model) == expected
        index = DocumentIndex(folder, model)
        if not expected:
            return
        own = model.encode_corpus(index.documents, instruction=EMBED)
        scores, positions = index.search(own, len(own))
        products = np.take_along_axis(own @ own.T, positions, axis=1)
        np.testing.assert_allclose(scores, products, atol=1e-5)
        _, (cache,) = model.encode_corpus(index.documents[-1:], instruction=EMBED, get_cache=True)
        stored = index.cache_of(len(own) - 1)
        np.testing.assert_allclose(stored.keys, cache.keys, atol=0.02 * np.abs(cache.keys).max())


class Killed(BaseException):
    """Ends a change as a signal would."""


@pytest.mark.parametrize("is_deleting", [False, True])
def test_a_change_may_be_killed_at_any_file(tmp_path, model, monkeypatch, is_deleting):
    build_index(model, DOCUMENTS, tmp_path / "before", caches="float32")
    old = {document["id"]: document for document in DOCUMENTS}
    new = {key: {**old[key], "text": f"new {key}"} for key in ("d1", "d3", "d4")}

    def change(folder):
        if is_deleting:
            delete_documents(folder, list(new))
        else:
            build_index(model, new.values(), folder, caches="float32")

    after = {key: old[key] for key in old.keys() - new.keys()} if is_deleting else old | new
    for kill_at in range(1, 100):
        folder = tmp_path / str(kill_at)
        shutil.copytree(tmp_path / "before", folder)
        with monkeypatch.context() as patch:
            is_killed = kill_after(kill_at, patch)
            with contextlib.suppress(Killed):
                change(folder)
        found = contents(folder, model)
        for key in old.keys() | found.keys():
            assert found.get(key) in (old.get(key), after.get(key))
        if not is_killed():
            break
        if not (is_deleting and found == after):
            change(folder)
        assert contents(folder, model) == after
    assert kill_at > 8
    index = DocumentIndex(folder, model)
    _, caches = model.encode_corpus(index.documents, instruction=EMBED, get_cache=True)
    for position, cache in enumerate(caches):
        np.testing.assert_allclose(index.cache_of(position).keys, cache.keys, atol=1e-5)
    assert not list(folder.glob(".part-*"))


def kill_after(count, monkeypatch):
    """Raises `Killed` before the file operation with this number; returns whether it did."""
    calls = []

    def counted(function):
        def run(*arguments, **options):
            calls.append(function)
            if len(calls) == count:
                raise Killed
            return function(*arguments, **options)

        return run

    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(Path, "write_text", counted(Path.write_text))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(np, "save", counted(np.save))
    return lambda: len(calls) >= count


def test_numbers_of_parts_are_not_used_again(tmp_path, model):
    """Another process may still read the part that had the number."""
    folder = tmp_path / "index"
    build_index(model, DOCUMENTS[:1], folder)
    seen = {path.name for path in folder.glob("part-*")}
    opened = DocumentIndex(folder, model)
    for _ in range(3):
        delete_documents(folder, ["d0"])
        build_index(model, DOCUMENTS[:1], folder)
        names = {path.name for path in folder.glob("part-*")}
        assert max(names) > max(seen)
        seen |= names
    with pytest.raises(DocumentIndexError, match=r"was removed by another process .*: open it"):
        opened.search(np.zeros((1, 32), np.float32))


def test_an_index_of_the_version_before_is_read_and_changed(tmp_path, model):
    """Version 2 had neither prompts nor deletions, and embedded with EMBED."""
    folder = tmp_path / "index"
    build_index(model, [{"text": text} for text in TEXTS], folder)
    stored = json.loads((folder / "index.json").read_text())
    for name in ("document_prompt", "query_prompt"):
        del stored[name]
    (folder / "index.json").write_text(json.dumps(stored | {"version": 2}))
    trained = with_prompts(model)
    index = DocumentIndex(folder, trained)
    assert index.settings["document_prompt"] == EMBED
    with pytest.raises(DocumentIndexError, match=r"document_prompt='<.embed.>.n', not "):
        build_index(trained, [{"text": "new"}], folder, instruction="Represent the article")
    update = build_index(trained, [{"id": "f.txt", "text": TEXTS[0]}, {"text": "new"}], folder)
    assert (update.added, update.replaced, update.unchanged) == (1, 1, 0)
    found = DocumentIndex(folder, trained)
    own = model.encode_corpus(found.documents, instruction=EMBED)
    np.testing.assert_allclose(found.search(own)[0], 1, atol=1e-5)
    assert delete_documents(folder, ["f.txt"]) == 1
    assert json.loads((folder / "index.json").read_text())["version"] == index_folder.VERSION


def with_prompts(model):
    """The model, as if it had been trained with instructions."""
    trained = GritLM(model.model, model.mesh, Tokenizer())
    trained.embedding_spec = dataclasses.replace(
        model.embedding_spec,
        query_prompt=embedding_prefix("Given a question, find the article"),
        document_prompt=embedding_prefix("Represent the article"),
    )
    return trained


def test_documents_are_embedded_with_the_prompt_of_the_index(tmp_path, model):
    trained, documents = with_prompts(model), [{"text": text} for text in TEXTS]
    for name, options, prompt in (
        ("stored", {}, trained.embedding_spec.document_prompt),
        ("given", {"instruction": "Represent the text"}, embedding_prefix("Represent the text")),
        ("none", {"instruction": ""}, EMBED),
    ):
        folder = tmp_path / name
        build_index(trained, documents, folder, **options)
        index = DocumentIndex(folder, trained)
        assert index.settings["document_prompt"] == prompt
        own, caches = model.encode_corpus(documents, instruction=prompt, get_cache=True)
        np.testing.assert_allclose(index.search(own)[0], 1, atol=1e-5)
        np.testing.assert_allclose(index.cache_of(1).keys, caches[1].keys, atol=1e-5)
        assert build_index(trained, documents, folder).unchanged == 3
    same = {"instruction": "Represent the article"}
    assert build_index(trained, documents, tmp_path / "stored", **same).unchanged == 3
    with pytest.raises(DocumentIndexError, match=r"not '<.embed.>.n': use the same value"):
        build_index(trained, documents, tmp_path / "stored", instruction="")
    with pytest.raises(InputError, match="tokens, instruction included, but the limit is 12"):
        build_index(trained, [{"text": "a " * 6}], tmp_path / "long", max_length=12)


def test_embeddings_of_nan_are_refused_before_they_are_written(tmp_path, model):
    broken = GritLM(make_model(model.model.config, 0), model.mesh, Tokenizer())
    state = nnx.state(broken.model)
    nnx.update(broken.model, jax.tree.map(lambda leaf: leaf * np.nan, state))
    with pytest.raises(NotFiniteError, match="the model's output for text 0 is not finite"):
        build_index(broken, DOCUMENTS, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    build_index(model, DOCUMENTS, tmp_path / "index")
    path = tmp_path / "index" / "part-00000" / "embeddings.npy"
    embeddings = np.load(path)
    embeddings[0, 0] = np.nan
    np.save(path, embeddings)
    with pytest.raises(DocumentIndexError, match=r"embeddings in .*index are NaN"):
        DocumentIndex(tmp_path / "index", model).search(np.zeros((1, 32), np.float32))


def test_unreadable_documents_are_named_and_left_out(tmp_path, model, monkeypatch):
    monkeypatch.setattr("grit_jax.inference.model_options.load_model", lambda _: model)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "good", "id": 1}\n{"text": "cut\n{"id": 2}\n')
    (folder / "b.jsonl.gz").write_bytes(b"not compressed")
    (folder / "empty.txt").write_text("")
    (folder / "good.txt").write_text("bread")
    (folder / "latin.txt").write_bytes(b"\xe9t\xe9")
    (folder / "long.md").write_text("river " * 800)
    build = ("rag", "build", "model", "texts", "--index", "index")
    built = grit_jax_in_process(*build, cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    expected = "index: 2 documents added, 0 replaced, 0 unchanged, 6 left out; total 2\n"
    assert built.stdout == expected
    for words in (
        "a.jsonl:2 is not a document (broken JSON)",
        "a.jsonl:3 has no string 'text'",
        "b.jsonl.gz, after line 0",
        "empty.txt has an empty text",
        "latin.txt is not UTF-8 text",
        "(ID 'texts/long.md'), 'river",
    ):
        (line,) = [line for line in built.stderr.splitlines() if words in line]
        assert line.startswith("left out: ")
    assert contents(tmp_path / "index", model).keys() == {"1", "texts/good.txt"}
    (folder / "good.txt").write_text("bread and salt")
    built = grit_jax_in_process(*build, cwd=tmp_path)
    assert ": 0 documents added, 1 replaced, 1 unchanged, 6 left out; total 2" in built.stdout
    deleted = grit_jax_in_process("rag", "delete", "--index=index", "texts/good.txt", cwd=tmp_path)
    assert deleted.stdout == "index: 1 documents deleted; total 1\n"
    for name in ("a.jsonl", "good.txt"):
        (folder / name).unlink()
    assert_fails_in_one_line(
        grit_jax_in_process(*build, cwd=tmp_path), "texts has no document that can be embedded"
    )
    (folder / "long.md").unlink()
    assert_fails_in_one_line(
        grit_jax_in_process(*build, cwd=tmp_path), "texts has no document that can be read"
    )
