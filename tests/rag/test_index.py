"""An index on disk: built in parts, extended, interrupted, searched, and errors."""

import dataclasses
import gzip
import json
import os
import resource
import shutil

from command_line import run_python
import numpy as np
import pytest

from grit_jax import GritLM
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.models import make_model
from grit_jax.rag import index as index_module
from grit_jax.rag.cache_store import quantize
from grit_jax.rag.documents import read_documents
from grit_jax.rag.index import DocumentIndex, build_index
from grit_jax.rag.index_folder import DocumentIndexError
from grit_jax.sharding import make_mesh
from grit_jax.text.templates import EMBED
from grit_jax.text.tokenizer import Tokenizer

WORDS = ["sea", "bread", "salt", "stone", "river", "lamp", "glass"]
DOCUMENTS = [
    {"text": " ".join(WORDS[n % 7] for n in range(i, 2 * i + 3, 1 + i % 3))} for i in range(11)
]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(index_module, "BATCH_SIZE", 2)
    monkeypatch.setattr(index_module, "PART_DOCUMENTS", 4)


def embeddings_of(model, documents):
    return np.stack([model.encode(d["text"], instruction=EMBED) for d in documents])


@pytest.mark.usefixtures("small_parts")
def test_the_nearest_documents_are_found_on_any_devices(tmp_path, model):
    assert build_index(model, DOCUMENTS, tmp_path / "index").added == 11
    queries = model.encode(["sea and salt", "a lamp of glass", "river"], instruction=EMBED)
    products = queries @ embeddings_of(model, DOCUMENTS).T
    best = np.argsort(-products, axis=1)[:, :5]
    eight = GritLM(model.model, make_mesh(), Tokenizer())
    for searching in (model, eight):
        scores, numbers = DocumentIndex(tmp_path / "index", searching).search(queries, 5)
        np.testing.assert_array_equal(numbers, best)
        np.testing.assert_allclose(scores, np.take_along_axis(products, best, 1), atol=1e-5)
        first_scores, first_numbers = DocumentIndex(tmp_path / "index", searching).search(
            queries[0], 5
        )
        np.testing.assert_array_equal(first_numbers, numbers[0])
        np.testing.assert_allclose(first_scores, scores[0], atol=1e-5)


def test_many_queries_are_compared_in_few_shapes(tmp_path, model, count_compilations):
    build_index(model, DOCUMENTS, tmp_path / "index")
    index = DocumentIndex(tmp_path / "index", model)
    queries = np.random.default_rng(0).normal(size=(75, 32)).astype(np.float32)
    products = queries @ embeddings_of(model, DOCUMENTS).T
    with count_compilations() as compilations:
        for count in (75, 70, 33, 32, 31, 1, 0):
            scores, numbers = index.search(queries[:count], 3)
            best = np.argsort(-products[:count], axis=1)[:, :3]
            np.testing.assert_array_equal(numbers, best)
            expected = np.take_along_axis(products[:count], best, 1)
            np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert len(compilations) == 4  # For 32, 16, 8 and 1 queries.


def test_an_index_may_have_more_parts_than_files_may_be_open(tmp_path, model):
    folder = tmp_path / "index"
    build_index(model, DOCUMENTS[:1], folder)
    for number in range(1, 60):
        shutil.copytree(folder / "part-00000", folder / f"part-{number:05d}")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 30, limits[1]))
    try:
        index = DocumentIndex(folder, model)
        scores, _ = index.search(embeddings_of(model, DOCUMENTS[:1]), 60)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    np.testing.assert_allclose(scores, 1, atol=1e-5)


@pytest.mark.usefixtures("small_parts")
def test_an_interrupted_index_goes_on_and_is_added_to(tmp_path, model):
    def cut_off():
        yield from DOCUMENTS[:7]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(model, cut_off(), tmp_path / "index")
    assert len(DocumentIndex(tmp_path / "index", model)) == 4  # Only complete parts.
    (tmp_path / "index" / ".part-of-a-killed-process").mkdir()
    assert build_index(model, DOCUMENTS[:7], tmp_path / "index").added == 3
    assert build_index(model, DOCUMENTS, tmp_path / "index").added == 4
    assert build_index(model, DOCUMENTS, tmp_path / "index").added == 0
    index = DocumentIndex(tmp_path / "index", model)
    assert index.documents == DOCUMENTS
    names = {path.name for path in (tmp_path / "index").iterdir()}
    assert names == {".lock", "index.json", "part-00000", "part-00001", "part-00002"}
    _, numbers = index.search(embeddings_of(model, DOCUMENTS))
    np.testing.assert_array_equal(numbers[:, 0], np.arange(11))


def test_one_process_at_a_time_adds_to_an_index(tmp_path, model):
    def documents():
        yield DOCUMENTS[0]
        with pytest.raises(DocumentIndexError, match=r"another process is changing .*index: wait"):
            build_index(model, DOCUMENTS, tmp_path / "index")
        yield DOCUMENTS[1]

    assert build_index(model, documents(), tmp_path / "index").added == 2
    assert build_index(model, DOCUMENTS, tmp_path / "index").added == len(DOCUMENTS) - 2


@pytest.mark.filterwarnings("ignore:1 of 1 texts were truncated to 64 tokens")
def test_with_more_room_an_index_goes_on_of_which_nothing_was_cut(tmp_path, model, monkeypatch):
    monkeypatch.setattr(index_module, "BATCH_SIZE", 1)
    monkeypatch.setattr(index_module, "PART_DOCUMENTS", 1)
    documents, folder = [DOCUMENTS[0], {"text": "river " * 100}, DOCUMENTS[1]], tmp_path / "index"
    with pytest.raises(InputError, match="or pass truncate=True"):
        build_index(model, documents, folder, max_length=64)
    assert build_index(model, documents, folder, max_length=64, truncate=True).added == 2
    assert DocumentIndex(folder, model).settings["truncate"]
    for options in ({"max_length": 64}, {"max_length": 128, "truncate": True}):
        with pytest.raises(DocumentIndexError, match="use the same value, or choose"):
            build_index(model, documents, folder, **options)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("form", "error"), [("float32", 1e-5), ("bfloat16", 4e-3), ("int8", 4e-3)])
def test_caches_come_back_as_they_were(tmp_path, model, form, error):
    build_index(model, DOCUMENTS, tmp_path / "index", caches=form)
    index = DocumentIndex(tmp_path / "index", model)
    for number in (0, 5, 10):
        _, (alone,) = model.encode_corpus([DOCUMENTS[number]], instruction=EMBED, get_cache=True)
        stored = index.cache_of(number)
        for name in ("positions", "segment_ids", "length"):
            np.testing.assert_array_equal(getattr(stored, name), getattr(alone, name))
        for name in ("keys", "values"):
            ours, theirs = np.asarray(getattr(stored, name)), np.asarray(getattr(alone, name))
            largest = np.abs(theirs).max(axis=-1, keepdims=True)
            assert (np.abs(ours - theirs) <= error * largest + 1e-6).all()


def test_caches_of_a_bfloat16_model_are_stored_in_any_form(tmp_path, model):
    config = dataclasses.replace(model.model.config, dtype="bfloat16", param_dtype="bfloat16")
    narrow = GritLM(make_model(config, 0), model.mesh, Tokenizer())
    _, (alone,) = narrow.encode_corpus(DOCUMENTS[:1], instruction=EMBED, get_cache=True)
    for form in ("float32", "bfloat16"):
        build_index(narrow, DOCUMENTS[:1], tmp_path / form, caches=form)
        stored = DocumentIndex(tmp_path / form, narrow).cache_of(0)
        np.testing.assert_array_equal(stored.keys, alone.keys)
        assert stored.keys.dtype == alone.keys.dtype


@pytest.mark.parametrize("largest", [1e-3, 1.0, 1e3])
def test_small_and_large_vectors_lose_as_little_in_int8(largest):
    array = np.random.default_rng(0).uniform(-largest, largest, (8, 1, 1, 64)).astype(np.float32)
    values, steps = quantize(array)
    error = np.abs(values * steps.astype(np.float32) - array)
    assert (error <= 0.01 * np.abs(array).max(axis=-1, keepdims=True)).all()


def test_a_head_of_zeros_stays_zero():
    values, steps = quantize(np.zeros((2, 1, 1, 4), np.float32))
    assert not values.any() and not steps.any()


def test_another_model_is_refused(tmp_path, model):
    build_index(model, DOCUMENTS[:2], tmp_path / "index")
    other = GritLM(make_model(model.model.config, 1), model.mesh, Tokenizer())
    by_first_token = GritLM(model.model, model.mesh, Tokenizer(), pooling="cls")
    for wrong in (other, by_first_token, model.unnormalized()):
        with pytest.raises(DocumentIndexError, match="was built with another model"):
            DocumentIndex(tmp_path / "index", wrong)
        with pytest.raises(DocumentIndexError, match="was built with another model"):
            build_index(wrong, DOCUMENTS, tmp_path / "index")


def test_what_is_wrong_with_an_index_is_named(tmp_path, model):
    folder = tmp_path / "index"
    with pytest.raises(DocumentIndexError, match="is not an index: run grit-jax rag build"):
        DocumentIndex(folder, model)
    build_index(model, DOCUMENTS[:2], folder)
    with pytest.raises(DocumentIndexError, match="caches=None, not 'int8'"):
        build_index(model, DOCUMENTS, folder, caches="int8")
    with pytest.raises(InputError, match="caches='int4' must be None or one of float32"):
        build_index(model, DOCUMENTS, folder, caches="int4")
    with pytest.raises(DocumentIndexError, match="was built with max_length=700, not 64"):
        build_index(model, DOCUMENTS, folder, max_length=64)
    with pytest.raises(InputError, match=r"have the shape \(2, 16\), but those in .* have 32 num"):
        DocumentIndex(folder, model).search(np.zeros((2, 16), np.float32))
    path = folder / "part-00000" / "embeddings.npy"
    for content in (path.read_bytes()[:-100], b""):
        path.write_bytes(content)
        with pytest.raises(DocumentIndexError, match="part-00000 is damaged"):
            DocumentIndex(folder, model)
    build_index(model, DOCUMENTS[:1], tmp_path / "caches", caches="int8")
    path = tmp_path / "caches" / "part-00000" / "keys.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DocumentIndexError, match="part-00000 is damaged"):
        DocumentIndex(tmp_path / "caches", model).cache_of(0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("Dear all")
    with pytest.raises(DocumentIndexError, match="has files that are not an index"):
        build_index(model, DOCUMENTS, tmp_path / "full")


def test_a_document_too_long_is_named_and_cut_only_if_asked_for(tmp_path, model, monkeypatch):
    documents = [*DOCUMENTS[:2], {"text": "river " * 900}]
    words = r"document 2, 'river .*', has 90\d tokens, instruction included, but the limit is 700"
    for at_once in (2, 128):
        monkeypatch.setattr(index_module, "BATCH_SIZE", at_once)
        with pytest.raises(InputError, match=words):
            build_index(model, documents, tmp_path / "index")
    with pytest.raises(InputError, match="document 1 has half of a surrogate pair"):
        build_index(model, [*DOCUMENTS[:1], {"text": "\ud83d"}], tmp_path / "index")
    with pytest.raises(InputError, match="document 1 has no string 'text'"):
        build_index(model, [*DOCUMENTS[:1], {"title": "a"}], tmp_path / "index")
    with pytest.raises(InputError, match="max_length=0 must be an integer of at least 1"):
        build_index(model, documents, tmp_path / "other", max_length=0)
    with pytest.raises(InputError, match="documents are of type dict: give a list of dictionaries"):
        build_index(model, {}, tmp_path / "other")
    with pytest.warns(UserWarning, match="1 of 3 texts were truncated to 700 tokens"):
        assert build_index(model, documents, tmp_path / "cut", truncate=True).added == 3


def test_a_title_of_none_is_no_title(tmp_path, model):
    for title in (None, ""):
        documents = [{"text": "one", "title": title}, {"text": "one"}]
        assert build_index(model, documents, tmp_path / f"index {title}").added == 1


def test_documents_are_read_from_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "title": "first", "more": 1}\n\n')
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "two", "title": None}) + "\n")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "c.txt").write_text("three\n", encoding="utf-8-sig")  # As Windows has it.
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "copy.txt").write_text("one")
    (tmp_path / "inner" / "._c.txt").write_bytes(b"\xa3")
    (tmp_path / "inner" / "d.png").write_bytes(b"\x89PNG")
    found = list(read_documents(str(tmp_path)))
    text_file = {"id": str(tmp_path / "inner" / "c.txt"), "text": "three\n"}
    first = {"text": "one", "title": "first", "more": 1}
    assert found == [first, {"text": "two", "title": None}, text_file]
    assert list(read_documents(text_file["id"])) == [text_file]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "cut', r"a.jsonl:2 is not a document \(broken JSON\): correct the line"),
        ('{"title": "only"}', "a.jsonl:2 has no string 'text'"),
        ('{"text": " "}', "a.jsonl:2 has an empty text"),
        ('["text"]', r"a.jsonl:2 is not a document \(not a JSON object\)"),
        ('{"text": "\\ud83d"}', "a.jsonl:2 has half of a surrogate pair at character 0"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(InputError, match=words):
        list(read_documents(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("is_compressed", [True, False])
def test_a_file_that_is_not_whole_or_not_compressed_is_named(tmp_path, is_compressed):
    content = b"".join(b'{"text": "%d"}\n' % (number**3) for number in range(3000))
    if is_compressed:
        content = gzip.compress(content)[:-3000]
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.jsonl\.gz, after line \d+: .*: repair the file"):
        list(read_documents(str(tmp_path)))


def test_a_source_that_is_not_there_is_named_at_once(tmp_path):
    with pytest.raises(InputError, match="none does not exist: give a folder"):
        read_documents(str(tmp_path / "none"))
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(InputError, match=r"has no \.jsonl"):
        read_documents(str(tmp_path))
    (tmp_path / "folder.md" / "a.txt").write_text("one")
    (found,) = read_documents(str(tmp_path))
    assert found["text"] == "one"


TFDS_MODULE = """
import numpy as np
import tensorflow_datasets as tfds


class Shelf(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("books", "maps")]

    def _info(self):
        features = {"title": tfds.features.Text(), "text": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split):
        for number in range(3):
            title = self.builder_config.name if number else ""
            yield number, {"title": title, "text": f"{split} {number} ü"}


class Numbers(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Tensor(shape=(2,), dtype=np.int64)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"text": [3, 4]}
"""
TFDS_SCRIPT = """
import shelf
from grit_jax.rag.documents import read_documents
from grit_jax.inference.prompt_encoder import InputError

for source in ("shelf", "shelf/test", "shelf/maps", "shelf/maps/test"):
    found = list(read_documents(f"tfds:{source}"))
    print(source, sorted((one.get("title", ""), one["text"]) for one in found))
for source in ("shelf/none", "nothing/at/all", "numbers"):
    try:
        list(read_documents(f"tfds:{source}"))
    except InputError as error:
        print(error)
"""


@pytest.mark.slow
def test_documents_come_from_a_dataset_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    (tmp_path / "shelf.py").write_text(TFDS_MODULE)
    finished = run_python(TFDS_SCRIPT, cwd=tmp_path)
    lines = [line for line in finished.stdout.splitlines() if line.startswith(("shelf", "tfds:"))]
    assert len(lines) == 7, finished.stderr
    for line, split, title in zip(
        lines, ["train", "test"] * 2, ["books"] * 2 + ["maps"] * 2, strict=False
    ):
        expected = [("", f"{split} 0 ü"), *((title, f"{split} {n} ü") for n in (1, 2))]
        assert line.partition(" ")[2] == str(expected)
    assert "tfds:shelf/none has no split 'none': use one of" in lines[4]
    assert "tfds:nothing/at/all is not a dataset of TFDS" in lines[5]
    assert lines[6] == "tfds:numbers, example 0 has no string 'text': give an object with 'text'"
