"""The embedded sample: its files, and the script that builds them."""

import base64
import gzip
import json
from pathlib import Path
import re
import subprocess
import unicodedata

import pytest

from grit_jax.sample import SAMPLE_FOLDER
from tools.sample import build, jargon, text, wordnet

SIDES = ("train", "held_out")
EMBEDDING_FILES = ("wordnet_senses", "jargon_entries")
CHAT_FILES = ("wordnet_chat", "jargon_chat")
MEGABYTE = 1_000_000


# ---- The files ----


@pytest.fixture(scope="module")
def sample() -> dict[str, list[dict]]:
    names = [f"{side}/{name}" for side in SIDES for name in EMBEDDING_FILES + CHAT_FILES]
    return {name: read(SAMPLE_FOLDER / f"{name}.jsonl.gz") for name in names}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in read_text(path).splitlines()]


def read_text(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def query(line: dict) -> str:
    return line["query"][1]


def positive(line: dict) -> str:
    return line["pos"][0][1]


def negatives(line: dict) -> list[str]:
    return [passage for _, passage in line["neg"]]


def sense_word(line: dict) -> str:
    return query(line).partition(": ")[0]


def chat_word(line: dict) -> str:
    """Returns the word that a chat asks about, the first in quotation marks."""
    return re.search('"(.+?)"', line["text"][0])[1]


def test_the_sample_fits_its_size_limits(sample):
    files = list(SAMPLE_FOLDER.rglob("*.jsonl.gz"))
    assert len(files) == 8
    assert sum(path.stat().st_size for path in files) <= MEGABYTE
    assert len(sample["train/wordnet_senses"]) >= 10_000
    assert len(sample["train/jargon_entries"]) >= 1_500
    assert len(sample["held_out/wordnet_senses"]) == 500
    assert len(sample["held_out/jargon_entries"]) == 250
    assert len(sample["held_out/wordnet_chat"]) == 150
    assert len(sample["held_out/jargon_chat"]) == 100


def test_embedding_lines_have_the_format(sample):
    for side in SIDES:
        for name in EMBEDDING_FILES:
            lines = sample[f"{side}/{name}"]
            assert len({line["query"][0] for line in lines}) == 1
            for line in lines:
                assert list(line) == ["query", "pos", "neg"]
                assert len(line["query"]) == 2
                assert line["query"][0]
                assert len(line["pos"]) == 1
                assert all(len(each) == 2 and each[0] == "" for each in line["pos"] + line["neg"])
                passages = [positive(line), *negatives(line)]
                assert len(set(passages)) == len(passages)


def test_chat_lines_have_the_format(sample):
    for side in SIDES:
        for name in CHAT_FILES:
            for line in sample[f"{side}/{name}"]:
                assert list(line) == ["text"]
                assert len(line["text"]) == 2
                assert all(isinstance(turn, str) and turn.strip() for turn in line["text"])
            first_words = {line["text"][0].split()[0] for line in sample[f"{side}/{name}"]}
            assert len(first_words) > 1, "all questions are worded alike"


def test_texts_are_clean_and_lines_unique(sample):
    for name, lines in sample.items():
        raw_lines = read_text(SAMPLE_FOLDER / f"{name}.jsonl.gz").splitlines()
        assert len(set(raw_lines)) == len(raw_lines) == len(lines)
        for line in lines:
            for each in every_text(line):
                assert each == each.strip()
                assert each
                assert "  " not in each
                assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in each)


def every_text(line: dict) -> list[str]:
    if "text" in line:
        return line["text"]
    return [*line["query"], positive(line), *negatives(line)]


def test_wordnet_queries_have_a_word_a_sentence_and_another_sense(sample):
    for side in SIDES:
        for line in sample[f"{side}/wordnet_senses"]:
            assert 1 <= len(negatives(line)) <= 2
            assert len(query(line).partition(": ")[2].split()) >= 4


def test_held_out_queries_and_positives_are_all_different(sample):
    lines = sample["held_out/wordnet_senses"] + sample["held_out/jargon_entries"]
    assert len({query(line) for line in lines}) == len(lines)
    assert len({positive(line) for line in lines}) == len(lines)


def plain_key(word: str) -> str:
    """Returns an independent key: lower case, no marks, no plural "s"."""
    return re.sub(r"[\W_]", "", word.casefold()).removesuffix("s")


@pytest.mark.parametrize("key", [text.term_key, plain_key])
def test_no_word_is_in_both_splits(sample, key):
    keys = {side: {key(word) for word in asked_words(sample, side)} for side in SIDES}
    assert len(keys["train"]) > 3_000
    assert len(keys["held_out"]) > 400
    assert not keys["train"] & keys["held_out"]


def asked_words(sample: dict[str, list[dict]], side: str) -> list[str]:
    words = [sense_word(line) for line in sample[f"{side}/wordnet_senses"]]
    words += [query(line) for line in sample[f"{side}/jargon_entries"]]
    return words + [chat_word(line) for name in CHAT_FILES for line in sample[f"{side}/{name}"]]


def test_no_held_out_positive_occurs_in_training(sample):
    seen = set()
    for name in EMBEDDING_FILES:
        for line in sample[f"train/{name}"]:
            seen |= {positive(line), *negatives(line)}
    for name in CHAT_FILES:
        seen |= {line["text"][1] for line in sample[f"train/{name}"]}
    for name in EMBEDDING_FILES:
        assert not seen & {positive(line) for line in sample[f"held_out/{name}"]}
    for name in CHAT_FILES:
        assert not seen & {line["text"][1] for line in sample[f"held_out/{name}"]}


def test_no_held_out_sentence_occurs_in_training(sample):
    sentences = {
        side: {query(line).partition(": ")[2] for line in sample[f"{side}/wordnet_senses"]}
        for side in SIDES
    }
    assert not sentences["train"] & sentences["held_out"]


def test_chats_match_the_embedding_files_of_their_split(sample):
    for side in SIDES:
        definitions = {positive(line) for line in sample[f"{side}/wordnet_senses"]}
        assert {line["text"][1] for line in sample[f"{side}/wordnet_chat"]} <= definitions
        headwords = {query(line) for line in sample[f"{side}/jargon_entries"]}
        assert {chat_word(line) for line in sample[f"{side}/jargon_chat"]} <= headwords


def test_masked_headwords_do_not_occur_in_their_entries(sample):
    masked = 0
    for line in sample["train/jargon_entries"] + sample["held_out/jargon_entries"]:
        headword, entry = query(line).casefold(), positive(line).casefold()
        masked += "____" in entry
        assert not re.search(rf"(?<!\w){re.escape(headword)}s?(?!\w)", entry), headword
        if len(headword) >= 4 and headword.isalnum():
            assert headword not in entry
    assert masked > 500


def test_licenses_are_included():
    licences = (SAMPLE_FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    notice = " ".join(licences.split())
    assert "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved." in notice
    assert "LICENSEE agrees to preserve same." in notice
    assert "This document (the Jargon File) is in the public domain" in notice


# ---- The script, on a small dictionary ----

# "charge" and "wave" are held out, "bank" and "draft" are in training; "wave" is too rare as a
# WordNet word, and still must not be in training.
CHARGE_FOR_DRAFT = "the charge for a draft was high"
FIRST_DRAFT = "she wrote the first draft quickly"
NOUNS = [
    (100, ["bank", "depository"], 'an institution that keeps money; "he cashed it at the banks"'),
    (200, ["bank"], 'sloping land beside a river; "they sat on the bank together"; "no use"'),
    (300, ["charge"], f'the price asked for something; "{CHARGE_FOR_DRAFT}"'),
    (400, ["charge"], 'a rapid advance of soldiers; "they broke in a sudden charge"'),
    # A held-out definition and a held-out sentence of a training word.
    (500, ["draft"], 'the price asked for something; "the draft was paid at once"'),
    (600, ["draft"], f'a rough version of a text; "{FIRST_DRAFT}"; "{CHARGE_FOR_DRAFT}"'),
    (700, ["widget"], 'a thing with no other sense; "we sold a small blue widget"'),
    (800, ["draft"], 'it quotes "words" within; "a cold draft blew in here"'),
    (900, ["wave"], 'a moving ridge of water; "a high wave hit the boat"'),
    (950, ["wave"], 'a movement of the hand; "he left with a wave"'),
]
VERBS = [(100, ["draft"], 'choose for military service; "he was drafted in that year"')]
NOUN_SENSES = {
    "bank": [100, 200],
    "depository": [100],
    "charge": [300, 400],
    "draft": [600, 500, 800],
    "widget": [700],
    "wave": [900, 950],
}
ENTRIES = {
    "hack": " /hak/, n.\n\n    1. Originally, a quick job that does the work. 2. Hacks please\n"
    "    every hacker, esp. the {old\n    hand}s who hack.\n\n        a verse on hacking",
    "wave": " vi.\n\n    To waving arms one adds a wave of the hand, see {hand}; nothing else.",
    "nil": "\n    See {zero}, and compare with all of {null} and {nought}, which see.",
    "SO": " n.\n\n    [acronym] Significant other. So two SOs also made it to the solstice party.",
}


@pytest.fixture
def sources(tmp_path) -> tuple[Path, Path]:
    """Small dictionaries in the real formats."""
    folder = tmp_path / "wordnet"
    folder.mkdir()
    licence = "  1 This is the licence\n"
    for name, letter, synsets in (("noun", "n", NOUNS), ("verb", "v", VERBS)):
        lines = [synset_line(letter, *synset) for synset in synsets]
        (folder / f"data.{name}").write_text(licence + "".join(lines))
    nouns = [index_line("n", *item) for item in NOUN_SENSES.items()]
    (folder / "index.noun").write_text(licence + "".join(nouns))
    (folder / "index.verb").write_text(licence + index_line("v", "draft", [100]))
    for name in ("data.adj", "index.adj", "data.adv", "index.adv"):
        (folder / name).write_text(licence)
    for name in ("noun", "verb", "adj", "adv"):
        (folder / f"{name}.exc").write_text("")
    counts = [f"{word}%1:04:00:: 1 9\n" for word in ("bank", "charge", "draft")]
    (folder / "cntlist.rev").write_text("".join(counts))
    return folder, write_jargon(tmp_path)


def synset_line(letter: str, offset: int, lemmas: list[str], gloss: str) -> str:
    words = " ".join(f"{lemma} 0" for lemma in lemmas)
    return f"{offset:08d} 04 {letter} {len(lemmas):02x} {words} 000 | {gloss}  \n"


def index_line(letter: str, lemma: str, offsets: list[int]) -> str:
    listed = " ".join(f"{offset:08d}" for offset in offsets)
    return f"{lemma} {letter} {len(offsets)} 1 @ {len(offsets)} 1 {listed}  \n"


def write_jargon(folder: Path) -> Path:
    data, index = b"", ""
    for headword, body in {"00-database-short": " About", **ENTRIES}.items():
        entry = f"{headword}\n{body}\n\n".encode()
        index += f"{headword}\t{dictd_number(len(data))}\t{dictd_number(len(entry))}\n"
        data += entry
    (folder / "jargon.index").write_text(index)
    path = folder / "jargon.dict.dz"
    path.write_bytes(gzip.compress(data))
    return path


def dictd_number(number: int) -> str:
    return base64.b64encode(number.to_bytes(6, "big")).decode().lstrip("A") or "A"


def run_build(sources: tuple[Path, Path], output: Path) -> int:
    folder, path = sources
    return build.main(["--wordnet", str(folder), "--jargon", str(path), "--output", str(output)])


def test_build_pairs_words_in_sentences_with_their_senses(sources, tmp_path):
    assert run_build(sources, tmp_path / "out") == 0
    train = read(tmp_path / "out/train/wordnet_senses.jsonl.gz")
    assert {line["query"][0] for line in train} == {build.WORDNET_INSTRUCTION}
    assert sorted(query(line) for line in train) == [
        "bank: he cashed it at the banks",
        "bank: they sat on the bank together",
        "draft: he was drafted in that year",
        f"draft: {FIRST_DRAFT}",
    ]
    by_query = {query(line): line for line in train}
    river = by_query["bank: they sat on the bank together"]
    assert positive(river) == "sloping land beside a river"
    assert negatives(river) == ["an institution that keeps money"]
    # The second noun sense is a held-out positive and the third is unclear; the verb remains.
    rough = by_query[f"draft: {FIRST_DRAFT}"]
    assert negatives(rough) == ["choose for military service"]
    drafted = by_query["draft: he was drafted in that year"]
    assert negatives(drafted) == ["a rough version of a text"]


def test_build_holds_out_all_senses_of_a_word(sources, tmp_path):
    assert run_build(sources, tmp_path / "out") == 0
    held_out = read(tmp_path / "out/held_out/wordnet_senses.jsonl.gz")
    assert {positive(line): negatives(line) for line in held_out} == {
        "the price asked for something": ["a rapid advance of soldiers"],
        "a rapid advance of soldiers": ["the price asked for something"],
    }
    chats = read(tmp_path / "out/held_out/wordnet_chat.jsonl.gz")
    assert {chat_word(line) for line in chats} == {"charge"}


def test_build_masks_headwords_and_drops_cross_references(sources, tmp_path):
    assert run_build(sources, tmp_path / "out") == 0
    train = read(tmp_path / "out/train/jargon_entries.jsonl.gz")
    assert {query(line): positive(line) for line in train} == {
        "hack": "1. Originally, a quick job that does the work. 2. ____ please every ____, esp. "
        "the old hands who ____.",
        "SO": "[acronym] Significant other. ____ two ____ also made it to the solstice party.",
    }
    held_out = read(tmp_path / "out/held_out/jargon_entries.jsonl.gz")
    assert [query(line) for line in held_out] == ["wave"]
    chats = read(tmp_path / "out/train/jargon_chat.jsonl.gz")
    answers = {chat_word(line): line["text"][1] for line in chats}
    assert answers["hack"].endswith("2. Hacks please every hacker, esp. the old hands who hack.")


def test_a_rebuild_gives_the_same_bytes(sources, tmp_path):
    for name in ("first", "second"):
        assert run_build(sources, tmp_path / name) == 0
    first = sorted((tmp_path / "first").rglob("*.gz"))
    assert len(first) == 8
    for path in first:
        again = tmp_path / "second" / path.relative_to(tmp_path / "first")
        assert path.read_bytes() == again.read_bytes()
        # No time and no name in the gzip header.
        assert path.read_bytes()[3:8] == bytes(5)
    assert not list((tmp_path / "first").glob(".sample-*"))


def test_the_split_depends_on_the_word_not_its_form():
    held_out = [word for word in ("charge", "wave", "bank", "draft") if text.is_held_out(word)]
    assert held_out == ["charge", "wave"]
    for forms in (["Dead Code", "dead-codes", "dead coding"], ["Bug", "bugs"], ["fly", "flies"]):
        assert len({text.term_key(form) for form in forms}) == 1
    assert text.term_key("C++") != "" != text.term_key("//")


@pytest.mark.parametrize(
    ("gloss", "definition", "sentences"),
    [
        ('a (long) word; "one"; "two"- A. Uthor', "a (long) word", ["one", "two"]),
        ('having much:"long on brains"', "having much", ["long on brains"]),
        ('known as "this" or that; "one"', "", []),
        ('(of a ball) "a ball that is out"', "", []),
        ('clear enough; "unclosed', "clear enough", []),
    ],
)
def test_a_gloss_splits_into_definition_and_sentences(gloss, definition, sentences):
    assert wordnet.split_gloss(gloss) == (definition, sentences)


def test_base_forms_of_inflected_forms():
    assert "make" in wordnet.base_forms("making", "v", {})
    assert "city" in wordnet.base_forms("cities", "n", {})
    assert "go" in wordnet.base_forms("went", "v", {"went": ["go"]})
    assert wordnet.base_forms("bus", "r", {}) == {"bus"}


def test_entries_are_truncated_at_a_sentence():
    first = "One sentence of just about ten words, e.g. this one."
    assert jargon.shorten(f"{first} {'And on ' * 30}.") == first
    long = "word " * 60
    assert jargon.shorten(long) == "word " * 45 + "..."


def test_other_spellings_of_headwords_are_masked():
    assert jargon.mask("a dead-code and DEAD CODES", "dead code") == "a ____ and ____"
    assert jargon.mask("the X of Death came", "Death, X of") == "the ____ came"
    assert jargon.mask("search an arc", "arc") == "search an ____"


def test_errors_name_bad_input(sources, tmp_path, capsys):
    folder, _path = sources
    (folder / "data.verb").write_text("00000100 29 v 01 draft 0 000\n")
    assert run_build(sources, tmp_path / "out") == 1
    assert "data.verb" in capsys.readouterr().err
    (folder / "data.verb").unlink()
    assert run_build(sources, tmp_path / "out") == 1
    assert "data.verb" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_errors_name_a_broken_jargon_file(sources, tmp_path, capsys):
    _, path = sources
    path.write_bytes(path.read_bytes()[:60])
    assert run_build(sources, tmp_path / "out") == 1
    assert "jargon.dict.dz" in capsys.readouterr().err
    path.with_name("jargon.index").unlink()
    assert run_build(sources, tmp_path / "out") == 1
    assert "jargon.index" in capsys.readouterr().err


def test_a_failed_download_names_the_package(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.main(["--output", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "wordnet-base" in message
    assert "apt-get" in message

    def fail(command, **_):
        raise subprocess.CalledProcessError(100, command, stderr="E: no such package")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(build.BuildError, match=r"dict-jargon.*no such package"):
        build.fetch("dict-jargon", tmp_path)
