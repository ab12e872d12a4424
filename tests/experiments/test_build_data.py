"""The folder of data, made whole from small packages of the real forms."""

import gzip
import json
from pathlib import Path
import shutil

import pytest

from experiments import build_data
from experiments.check import LeakError, check_folder
from experiments.datasets import DATASETS, SMALLEST_CORPUS
from experiments.files import read_lines, write_lines
from experiments.sources.debian import Debian
from grit_jax.text.examples import TextOptions
from grit_jax.text.kinds import TEXT_KINDS, kind_of_line
from grit_jax.text.tokenizer import Tokenizer


@pytest.fixture
def built(whole_data, tmp_path) -> Path:
    return Path(shutil.copytree(whole_data, tmp_path / "data"))


def files_of(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def lines_of(folder: Path) -> dict[str, list[dict]]:
    return {path.name: read_lines(path) for path in sorted(folder.glob("*.jsonl.gz"))}


def plain(text: str) -> str:
    return " " + " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split()) + " "


def test_every_dataset_has_both_sides_and_each_line_is_an_example(built):
    tokenizer, options = Tokenizer(), TextOptions()
    train, held_out = lines_of(built / "train"), lines_of(built / "held_out")
    names = {f"{each.chat_name}.jsonl.gz" for each in DATASETS}
    names |= {f"{each.embedding_name}.jsonl.gz" for each in DATASETS if each.passages}
    assert set(train) == set(held_out) == names
    for lines in (*train.values(), *held_out.values()):
        assert lines
        for line in lines[:40]:
            kind = TEXT_KINDS[kind_of_line(line)]
            example = kind.tokenize(tokenizer, kind.to_canonical(line), options)
            assert all(text.mask.any() for text in example.texts)


def test_no_held_out_text_word_or_question_is_in_training(built):
    train, held_out = lines_of(built / "train"), lines_of(built / "held_out")
    trained_on = "\n".join(
        plain(text) for lines in train.values() for line in lines for text in texts_of(line)
    )
    keys = {key for lines in train.values() for line in lines for key in line["keys"]}
    count = 0
    for line in (line for lines in held_out.values() for line in lines):
        assert not keys.intersection(line["keys"])
        if "pos" in line:
            for _, passage in line["pos"] + line["neg"]:
                assert plain(passage) not in trained_on
                count += 1
    assert count > 60
    words = {line["query"][1].partition(": ")[0] for line in held_out["wordnet_senses.jsonl.gz"]}
    asked = [line["text"][0] for line in train["wordnet_chat.jsonl.gz"]]
    assert words
    assert not [text for text in asked for word in words if f'"{word}"' in text.lower()]


def texts_of(line: dict) -> list[str]:
    pairs = [line["query"], *line["pos"], *line["neg"]] if "query" in line else []
    return line.get("text", []) + [text for _, text in pairs]


def test_the_same_packages_give_the_same_bytes(built, downloads, reasoning_gym, tmp_path):
    build_data.build(Debian(downloads), tmp_path / "again", print)
    assert files_of(built) == files_of(tmp_path / "again")


def test_corpora_have_their_queries_answers_and_choices_one_right_answer(built):
    for dataset in (each for each in DATASETS if each.passages):
        corpus = built / "evaluation/corpora" / dataset.embedding_name
        documents = [line["text"] for line in read_lines(corpus / "documents.jsonl.gz")]
        held_out = read_lines(built / f"held_out/{dataset.embedding_name}.jsonl.gz")
        assert len(set(documents)) == len(documents) <= max(SMALLEST_CORPUS, len(held_out))
        queries = read_lines(corpus / "queries.jsonl.gz")
        assert len(queries) == len(held_out)
        for query, line in zip(queries, held_out, strict=True):
            assert [query["instruction"], query["text"]] == line["query"]
            assert [documents[number] for number in query["relevant"]] == [line["pos"][0][1]]
    items = read_lines(built / "evaluation/wordnet_choices.jsonl.gz")
    by_sentence = {
        line["query"][1].partition(": ")[2]: line
        for line in read_lines(built / "held_out/wordnet_senses.jsonl.gz")
    }
    assert len(items) == len(by_sentence)
    for item in items:
        line = next(line for sentence, line in by_sentence.items() if sentence in item["question"])
        assert len(set(item["choices"])) == len(item["choices"]) == 4
        assert item["choices"][item["answer"]] == line["pos"][0][1]
        assert {text for _, text in line["neg"]} <= set(item["choices"])
    assert len({item["answer"] for item in items}) > 1


@pytest.mark.parametrize("leak", ["definition", "key", "question"])
def test_what_is_held_out_is_found_in_training(built, leak):
    check_folder(built)
    held_out = read_lines(built / "held_out/wordnet_senses.jsonl.gz")[0]
    task = read_lines(built / "held_out/reasoning_chat.jsonl.gz")[0]
    path = built / "train/debian_chat.jsonl.gz"
    line = {
        "definition": {"text": ["Well?", f"This: {held_out['pos'][0][1].upper()}."], "keys": ["k"]},
        "key": {"text": ["Well?", "Yes."], "keys": held_out["keys"]},
        "question": {"text": [task["text"][0], "I do not know."], "keys": ["k"]},
    }[leak]
    lines = read_lines(path)
    write_lines(path, [*lines, line])
    with pytest.raises(LeakError, match=rf"line {len(lines) + 1} of train/debian_chat"):
        check_folder(built)


def test_a_failure_leaves_what_was_there(built, downloads, reasoning_gym, monkeypatch):
    before = files_of(built)
    arguments = [str(built), "--downloads", str(downloads)]
    with monkeypatch.context() as patched:
        patched.setattr(build_data, "write_evaluation", lambda *_: [].pop())
        with pytest.raises(IndexError):
            build_data.main(arguments)
    assert files_of(built) == before
    assert [path.name for path in built.parent.iterdir()] == ["data"]
    assert build_data.main(arguments) == 0
    assert files_of(built) == before


def test_a_package_that_is_not_what_it_should_be_is_named(
    downloads, reasoning_gym, tmp_path, capsys
):
    broken = tmp_path / "downloads"
    shutil.copytree(downloads, broken)
    (broken / "lists/Packages").write_text("<html>Not found</html>")
    arguments = [str(tmp_path / "data"), "--downloads", str(broken)]
    assert build_data.main(arguments) == 1
    assert f"not a list of packages: {broken / 'lists/Packages'}" in capsys.readouterr().err
    index = broken / "packages/dict-jargon/usr/share/dictd/jargon.index"
    index.unlink()
    assert build_data.main(arguments) == 1
    assert str(index) in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_the_folder_says_what_it_was_made_from(built):
    told = json.loads((built / "data.json").read_text())
    assert told["lines"]["wordnet_senses"]["train"] == len(
        read_lines(built / "train/wordnet_senses.jsonl.gz")
    )
    assert set(told["versions"]) >= {"wordnet-base", "python3.11-doc", "Translation-en"}
    for name in told["sha256"]:
        assert gzip.decompress((built / name).read_bytes())
