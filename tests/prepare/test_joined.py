"""Queries that name their passages by ID: BEIR's folders, and Nemotron's."""

import json

from hypothesis import given, settings, strategies
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grit_jax.prepare.finding import find_datasets, find_files
from grit_jax.prepare.joined import Corpus
from grit_jax.text.examples import RejectedExample
from grit_jax.text.jsonl import SourceError

CORPUS = [
    {"_id": f"d{n}", "title": f"t{n}" if n % 2 else "", "text": f"text {n}"} for n in range(9)
]
QUERIES = [{"_id": f"q{n}", "text": f"query {n}", "metadata": {}} for n in range(4)]
QRELS = [("q2", "d1", 1), ("q0", "d2", 2), ("q2", "d8", 1), ("q0", "d3", 0), ("q1", "gone", 1)]


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_qrels(path, qrels):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [("query-id", "corpus-id", "score"), *qrels]
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))


@pytest.fixture
def beir(tmp_path):
    write_lines(tmp_path / "scifact" / "corpus.jsonl", CORPUS)
    write_lines(tmp_path / "scifact" / "queries.jsonl", QUERIES)
    write_qrels(tmp_path / "scifact" / "qrels" / "train.tsv", QRELS)
    write_qrels(tmp_path / "scifact" / "qrels" / "test.tsv", [("q3", "d5", 1)])
    return tmp_path


def read(files, block_bytes=20):
    found = []
    for file in files:
        for block in file.read(block_bytes):
            for number, _, parse in block.rows():
                try:
                    found.append((number, parse()))
                except RejectedExample as reason:
                    found.append((number, str(reason)))
    return found


def test_a_beir_folder_is_its_queries_with_the_texts_that_are_judged(beir):
    found = find_datasets(beir)
    assert found.datasets.keys() == {"scifact"}
    assert [path.name for path in found.unread] == ["test.tsv"]
    (file,) = found.datasets["scifact"]
    assert read([file]) == [
        (1, {"query": ["", "query 2"], "pos": [["", "t1 text 1"], ["", "text 8"]], "neg": []}),
        (2, {"query": ["", "query 0"], "pos": [["", "text 2"]], "neg": [["", "t3 text 3"]]}),
        (3, "a document that the corpus does not have"),
    ]
    assert [each["name"] for each in file.describe()] == [
        "train.tsv",
        "corpus.jsonl",
        "queries.jsonl",
    ]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("corpus.jsonl", [*CORPUS, CORPUS[2]], "two documents of the corpus have the ID 'd2'"),
        ("corpus.jsonl", [{"_id": "d1"}], r"corpus\.jsonl, row 1: a document has no ID or no text"),
        ("queries.jsonl", QUERIES[:2], r"queries\.jsonl has no query 'q2' of .*train\.tsv"),
        ("qrels/train.tsv", [], r"train\.tsv: no rows"),
    ],
)
def test_damaged_beir_folders_are_named(beir, name, lines, message):
    write_lines(beir / "scifact" / name, lines)
    if not lines:
        write_qrels(beir / "scifact" / name, [("q2", "d1", "high")])
        message = r"train\.tsv, row 1: not a line of query-id, corpus-id and score"
    with pytest.raises(SourceError, match=message):
        read(find_files(beir))


def test_judgments_for_tests_are_not_trained_on(beir):
    (beir / "scifact" / "qrels" / "train.tsv").unlink()
    with pytest.raises(
        SourceError, match=r"scifact is .* without qrels/train\.tsv \(only test\.tsv\)"
    ):
        find_datasets(beir)


INSTRUCTION = "Instruct: Given a claim, find documents that refute it\nQuery: "
RECORDS = [
    {
        "question_id": "1",
        "question": "query 0",
        "corpus_id": "x",
        "pos_doc": [{"id": "d2"}],
        "neg_doc": [{"id": "d3"}, "d4"],
    },
    {"question": "query 1", "corpus_id": "x", "pos_doc": [{"id": "d1"}], "neg_doc": []},
]
EXPECTED = [
    (
        1,
        {
            "query": ["Given a claim, find documents that refute it", "query 0"],
            "pos": [["", "text 2"]],
            "neg": [["", "text 3"], ["", "text 4"]],
        },
    ),
    (
        2,
        {
            "query": ["Given a claim, find documents that refute it", "query 1"],
            "pos": [["", "text 1"]],
            "neg": [],
        },
    ),
]


def write_corpus(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    documents = [{"id": each["_id"], "text": each["text"]} for each in CORPUS]
    pq.write_table(pa.Table.from_pylist(documents), path)


def test_nemotrons_json_names_its_corpus(tmp_path):
    write_corpus(tmp_path / "FEVER" / "corpus" / "train.parquet")
    metadata = {"corpus_id": "x", "class": "TextQADataset", "query_instruction": INSTRUCTION}
    (tmp_path / "FEVER" / "corpus" / "merlin_metadata.json").write_text(json.dumps(metadata))
    path = tmp_path / "FEVER" / "train.json"
    path.write_text(json.dumps({"corpus": {"path": "./corpus/"}, "data": RECORDS}, indent=2))
    assert find_datasets(tmp_path).datasets.keys() == {"FEVER/train"}
    for root in (tmp_path, path):
        assert read(find_files(root)) == EXPECTED
    path.write_text(json.dumps({"corpus": [{"path": "gone"}], "data": RECORDS}))
    with pytest.raises(SourceError, match=r"its corpus .*gone has no merlin_metadata\.json"):
        find_files(path)
    path.write_text(json.dumps({"data": RECORDS}))
    with pytest.raises(SourceError, match="does not begin with"):
        find_files(path)


def test_nemotrons_folders_on_the_hub_have_parquet_files(tmp_path):
    folder = tmp_path / "FEVER"
    write_corpus(folder / "corpus" / "train-00000-of-00001.parquet")
    rows = [
        {"question": each["question"], "pos_doc": [{"id": d["id"]} for d in each["pos_doc"]]}
        | {"neg_doc": [{"id": d if isinstance(d, str) else d["id"]} for d in each["neg_doc"]]}
        for each in RECORDS
    ]
    (folder / "queries").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "queries" / "train-00000-of-00001.parquet")
    metadata = {"corpus_id": "x", "ids_only": False, "query_instruction": INSTRUCTION}
    (folder / "dataset_metadata.json").write_text(json.dumps(metadata))
    assert find_datasets(tmp_path).datasets.keys() == {"FEVER"}
    assert read(find_files(tmp_path)) == EXPECTED
    (folder / "dataset_metadata.json").write_text(json.dumps({**metadata, "ids_only": True}))
    with pytest.raises(SourceError, match="IDs of its documents only"):
        find_files(tmp_path)


texts = strategies.dictionaries(strategies.text(max_size=4), strategies.text(max_size=6))


@settings(deadline=None)
@given(texts, strategies.lists(strategies.text(max_size=4)))
def test_a_corpus_has_the_texts_of_the_documents_that_are_wanted(documents, others):
    wanted = [*list(documents)[::2], *others]
    corpus = Corpus(documents.items(), wanted)
    for name in {*wanted, *documents}:
        if name in documents and name in wanted:
            assert corpus[name] == documents[name]
        else:
            with pytest.raises(RejectedExample):
                corpus[name]
