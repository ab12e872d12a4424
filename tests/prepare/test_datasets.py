"""Declaring datasets and mixtures of files, and data that an earlier version prepared."""

import json
import tarfile

from command_line import ROOT, grit_jax_in_process
import pytest

from grit_jax.data.manifest import PreparedDataset, load_mixture
from grit_jax.prepare.datasets import add_collection, add_dataset, add_mixture, by_size
from grit_jax.prepare.prepare import prepare_mixtures
from grit_jax.text.examples import TextOptions
from grit_jax.text.jsonl import SourceError
from grit_jax.text.tokenizer import Tokenizer

OPTIONS = TextOptions(query_length=24, passage_length=32, chat_length=48)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in {"one": 3, "two": 5}.items():
        lines = [{"query": f"{name} {n}", "pos": [f"answer {n}"]} for n in range(count)]
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "files"


def prepare(*names):
    return prepare_mixtures(names, [], "out", Tokenizer(), OPTIONS, processes=1)


def test_declared_datasets_are_mixed_at_their_rates(files):
    def upper(line):
        return None if line["query"] == "one 0" else {**line, "query": line["query"].upper()}

    add_dataset("upper", "embedding", files / "one.jsonl", upper)
    add_dataset("sized", "embedding", {"train": [files / "one.jsonl", files / "two.jsonl"]})
    add_mixture("both", {"upper": 3.5, "sized": by_size})
    assert prepare("both") == ["both"]
    rates = load_mixture("out", "both", "train", "embedding", "x")
    assert {dataset.name: rate for dataset, rate in rates.items()} == {"upper": 3.5, "sized": 8}
    queries = [example.query for example in next(iter(rates)).read([0, 1])]
    texts = [Tokenizer().decode(query.tokens[query.mask].tolist()) for query in queries]
    assert texts == ["ONE 1", "ONE 2"]


def test_a_declared_collection_can_be_mixed_with_the_sample(files):
    assert add_collection("mine", files) == ["mine"]
    add_mixture("more", {"mine.two": by_size, "jargon_entries": 2.0})
    with pytest.raises(SourceError, match="there is a mixture 'mine' already"):
        add_collection("mine", files)


def test_files_of_a_folder_that_are_not_read_are_named(files, capsys):
    add_collection("read", files)
    assert capsys.readouterr().out == ""
    for number in range(6):
        (files / f"{number}.xlsx").touch()
    (files / "notes").mkdir()
    (files / "notes" / "a.md").touch()
    add_collection("half_read", files)
    assert capsys.readouterr().out == (
        f"{files}: not read (of another type, or not for training): 0.xlsx, 1.xlsx, 2.xlsx, "
        "3.xlsx, 4.xlsx and 2 more\n"
    )


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda f: add_dataset("wordnet_chat", "embedding", f), "'wordnet_chat' already"),
        (lambda f: add_dataset("squad", "embedding", f), "'squad' already"),
        (lambda f: add_dataset("a/b", "embedding", f), "'a/b' is not a name"),
        (lambda f: add_dataset("a", "pairs", f), "'pairs' is not one of embedding, generative"),
        (lambda f: add_dataset("a", "embedding", f / "nowhere"), "no such file or folder"),
        (lambda f: add_dataset("a", "embedding", f, held_out=1.0), "from 0 to below 1"),
        (
            lambda f: add_dataset("a", "embedding", {"train": f, "held_out": f}, held_out=0.1),
            "not both",
        ),
        (lambda f: add_mixture("sample_chat", {}), "'sample_chat' already"),
        (lambda f: add_mixture("a", {"nothing": 1.0}), "no dataset 'nothing'"),
    ],
)
def test_a_wrong_declaration_is_explained(files, declare, message):
    with pytest.raises(SourceError, match=message):
        declare(files)


@pytest.fixture
def earlier(tmp_path):
    """Files, and the folder `out` that commit 860dcd0 prepared from them."""
    with tarfile.open(ROOT / "tests" / "reference" / "prepared_860dcd0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def prepare_earlier(folder):
    lengths = ("--query-length", 24, "--passage-length", 32, "--chat-length", 48)
    sources = ("pairs.jsonl", "chats.jsonl", "--output", "out", "--max-rejected", 0.5)
    finished = grit_jax_in_process("prepare", *sources, *lengths, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_data_of_an_earlier_version_are_read_and_prepared_again_with_the_same_records(earlier):
    read = {
        name: PreparedDataset(earlier / "out", name, "train").read(range(count))
        for name, count in {"pairs": 3, "chats": 5}.items()
    }
    report = prepare_earlier(earlier)
    for name, examples in read.items():
        assert f"out/{name}: prepared again (changed version of the text code)" in report
        again = PreparedDataset(earlier / "out", name, "train").read(range(len(examples)))
        assert [e.to_bytes() for e in again] == [e.to_bytes() for e in examples]


def test_only_the_options_of_its_kind_make_a_dataset_stale(earlier):
    prepare_earlier(earlier)
    lengths = ("--query-length", 24, "--passage-length", 32, "--chat-length", 47)
    sources = ("pairs.jsonl", "chats.jsonl", "--output", "out", "--max-rejected", 0.5)
    report = grit_jax_in_process("prepare", *sources, *lengths, cwd=earlier).stdout
    assert "out/pairs: up to date" in report
    assert "out/chats: prepared again (changed options)" in report
