"""Small downloads in the real formats, with real text where it is free."""

import base64
from collections.abc import Iterable
import gzip
from pathlib import Path
import sys
import types

import pytest

from experiments.build_data import build
from experiments.files import read_lines
from experiments.sources.debian import Debian
from grit_jax.sample import SAMPLE_FOLDER

NUM_WORDS, NUM_TERMS, NUM_PACKAGES, NUM_QUESTIONS, NUM_ITEMS = 120, 60, 80, 40, 30


@pytest.fixture(scope="session")
def senses() -> list[tuple[str, str, str, str]]:
    """Words with a sentence, its sense and another sense, from the embedded sample."""
    lines = read_lines(SAMPLE_FOLDER / "held_out" / "wordnet_senses.jsonl.gz")
    found = {}
    for line in lines:
        word, _, sentence = line["query"][1].partition(": ")
        if " " not in word and word.lower() in sentence.lower().split():
            found.setdefault(word.lower(), (sentence, line["pos"][0][1], line["neg"][0][1]))
    return [(word, *told) for word, told in sorted(found.items())][:NUM_WORDS]


@pytest.fixture(scope="session")
def downloads(tmp_path_factory, senses) -> Path:
    """A filled download folder for `Debian`."""
    folder = tmp_path_factory.mktemp("downloads")
    packages = folder / "packages"
    write_wordnet(packages / "wordnet-base/usr/share/wordnet", senses)
    entries = read_lines(SAMPLE_FOLDER / "held_out" / "jargon_entries.jsonl.gz")
    told = {
        line["query"][1]: line["pos"][0][1].replace("____", line["query"][1]) for line in entries
    }
    terms = [term for term in sorted(told) if term.isalpha()]
    write_dictd(
        packages / "dict-jargon/usr/share/dictd/jargon.dict.dz",
        [f"{term}\n\n    {told[term]}\n" for term in terms[:NUM_TERMS]],
    )
    write_dictd(
        packages / "dict-foldoc/usr/share/dictd/foldoc.dict.dz",
        [
            f"{term}\n{term} system\n\n   <{kind}> {told[term]}\n\n   (1996-08-20)\n\n"
            for term, kind in zip(terms[NUM_TERMS // 2 :], ["language", "tool"] * 99, strict=False)
        ],
    )
    write_faqs(packages)
    write_lists(folder / "lists", [sense[1:3] for sense in senses])
    return folder


@pytest.fixture(scope="session")
def reasoning_gym():
    """A fake reasoning-gym, which needs a C compiler, with few items in the same format."""

    def create_dataset(name: str, seed: int, size: int, **options):
        assert isinstance(seed, int)
        assert options
        return [reasoning_item(name, number) for number in range(min(size, NUM_ITEMS))]

    module = types.ModuleType("reasoning_gym")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "create_dataset", create_dataset, raising=False)
        patched.setitem(sys.modules, "reasoning_gym", module)
        yield


@pytest.fixture(scope="session")
def whole_data(downloads, reasoning_gym, tmp_path_factory) -> Path:
    """The data built from the downloads; do not modify it."""
    folder = tmp_path_factory.mktemp("built") / "data"
    build(Debian(downloads), folder, print)
    return folder


def reasoning_item(name: str, number: int) -> dict:
    metadata = {
        "expression": f"{number} + 1",
        "numbers": [number + 2, 4],
        "equation": f"{number}*k = 0",
    }
    question = f"What does {name} make of {number} and {number % 7}?\n"
    return {"question": question, "answer": str(number + 1), "metadata": metadata}


def write_wordnet(folder: Path, senses: Iterable[tuple[str, str, str, str]]) -> None:
    folder.mkdir(parents=True)
    data, index = "", ""
    for number, (word, sentence, meaning, other) in enumerate(senses):
        first, second = 1000 + 2 * number, 1001 + 2 * number
        for offset, gloss in ((first, f'{meaning}; "{sentence}"'), (second, other)):
            data += f"{offset:08d} 04 n 01 {word} 0 000 | {gloss}  \n"
        index += f"{word} n 2 1 @ 2 1 {first:08d} {second:08d}  \n"
    licence = "  1 This software and database is being provided\n"
    for name in ("noun", "verb", "adj", "adv"):
        (folder / f"data.{name}").write_text(licence + (data if name == "noun" else ""))
        (folder / f"index.{name}").write_text(licence + (index if name == "noun" else ""))
        (folder / f"{name}.exc").write_text("")
    (folder / "cntlist.rev").write_text("bank%1:04:00:: 1 9\n")


def write_dictd(path: Path, entries: Iterable[str]) -> None:
    """Writes a dictionary; the lines of an entry before the first empty one are headwords."""
    path.parent.mkdir(parents=True)
    data, index = b"", ""
    for entry in ("00-database-short\n\n    About\n", *entries):
        raw = entry.encode()
        for headword in entry.split("\n\n")[0].split("\n"):
            index += f"{headword.lower()}\t{dictd_number(len(data))}\t{dictd_number(len(raw))}\n"
        data += raw
    path.write_bytes(gzip.compress(data))
    path.with_name(path.name.removesuffix(".dict.dz") + ".index").write_text(index)


def dictd_number(number: int) -> str:
    return base64.b64encode(number.to_bytes(6, "big")).decode().lstrip("A") or "A"


def write_faqs(packages: Path) -> None:
    perl = packages / "perl-doc/usr/share/perl/5.36.0/pod"
    python = packages / "python3.11-doc/usr/share/doc/python3.11/html/_sources/faq"
    for folder in (perl, python):
        folder.mkdir(parents=True)
    pod, rst = "=head1 NAME\n\nperlfaq4 - Data\n\n", "FAQ\n===\n\n"
    for number in range(NUM_QUESTIONS):
        answer = f"Sort them by key number {number}, which takes {number} passes over the list."
        pod += f"=head2 How do I sort {number} hashes?\n\nYou can use C<sort>. {answer}\n\n"
        title = f"How are {number} tuples sorted?"
        rst += f"{title}\n{'-' * len(title)}\n\nUse :func:`sorted`. {answer} It is stable.\n\n\n"
    (perl / "perlfaq4.pod").write_text(pod)
    (python / "design.rst.txt").write_text(rst)


def write_lists(folder: Path, texts: Iterable[tuple[str, str]]) -> None:
    """Writes a package for each text; some share a source package."""
    folder.mkdir(parents=True)
    packages, translation = "", ""
    for number, (sentence, meaning) in enumerate(list(texts)[:NUM_PACKAGES]):
        name = f"tool{chr(97 + number // 26)}{chr(97 + number % 26)}"
        for suffix in ("", "-dev"):
            packages += f"Package: {name}{suffix}\nSource: {name} (1.{number})\nVersion: 1\n\n"
            translation += (
                f"Package: {name}{suffix}\nDescription-md5: 0\n"
                f"Description-en: helper {name[-2:]} for {' '.join(sentence.split()[:3])}{suffix}\n"
                f" {name} is made for those who say this: {sentence.upper()}, or else\n"
                f" it does what {len(meaning)} others do.\n .\n  * a list\n .\n It is free.\n\n"
            )
    (folder / "Packages").write_text(packages)
    (folder / "Translation-en").write_text(translation)
