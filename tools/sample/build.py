"""Builds the embedded sample from the Debian packages ``wordnet-base`` and ``dict-jargon``.

    python -m tools.sample.build [--output DIR]
    python -m tools.sample.build --wordnet DIR --jargon jargon.dict.dz

The first command downloads both packages with ``apt-get download`` to a temporary folder, without
root. The second uses local files: the folder with WordNet's ``data.noun`` etc., and the Jargon
File with ``jargon.index`` in the same folder. The same input gives byte-identical files.
"""

import argparse
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
import gzip
import io
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile

from grit_jax.sample import SAMPLE_FOLDER
from tools.sample.jargon import Entry, read_jargon
from tools.sample.text import in_stable_order, is_held_out, pick, stable_number, term_key
from tools.sample.wordnet import SensePair, find_pairs, read_wordnet

WORDNET_INSTRUCTION = (
    "Given a word and a sentence that uses it, retrieve the definition of the word in that sentence"
)
JARGON_INSTRUCTION = "Given a term of hacker slang, retrieve its entry"
# The word always comes first, in quotation marks.
WORDNET_QUESTIONS = (
    'What does "{word}" mean in "{sentence}"?',
    'Define "{word}" as it is used in "{sentence}".',
    'What is meant by "{word}" in this sentence: "{sentence}"',
    'Explain the word "{word}" in "{sentence}".',
    'How should I understand "{word}" here? "{sentence}"',
)
JARGON_QUESTIONS = (
    'What does the hacker term "{word}" mean?',
    'What do hackers mean by "{word}"?',
    'Explain the hacker slang "{word}".',
    'What is "{word}" in hacker jargon?',
)

PACKAGES = {"wordnet": "wordnet-base", "jargon": "dict-jargon"}
WORDNET_IN_PACKAGE = Path("usr/share/wordnet")
JARGON_IN_PACKAGE = Path("usr/share/dictd/jargon.dict.dz")

Line = dict[str, object]
Files = dict[str, list[Line]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the sample; the defaults take about one megabyte."""

    most_negatives: int = 2
    train_pairs: int = 11_600
    train_chats: int = 2000
    train_jargon_chats: int = 600
    held_out_pairs: int = 500
    # A second sense of the same word makes held-out retrieval harder.
    held_out_pairs_per_word: int = 2
    held_out_least_tag_count: int = 5
    held_out_entries: int = 250
    held_out_chats: int = 150
    held_out_jargon_chats: int = 100


DEFAULT_SIZES = Sizes()


class BuildError(Exception):
    """The sample cannot be built; the message says why."""


def main(arguments: list[str] | None = None) -> int:
    """Builds the files and prints their lines and bytes."""
    options = _parse_arguments(arguments)
    try:
        with tempfile.TemporaryDirectory() as downloads:
            wordnet = options.wordnet or fetch(PACKAGES["wordnet"], downloads) / WORDNET_IN_PACKAGE
            jargon = options.jargon or fetch(PACKAGES["jargon"], downloads) / JARGON_IN_PACKAGE
            files = make_files(wordnet, jargon)
        write_files(files, options.output)
    except (BuildError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, lines in files.items():
        size = (options.output / name).stat().st_size
        print(f"{name}: {len(lines)} lines, {size} bytes")
    return 0


def fetch(package: str, folder: str | Path) -> Path:
    """Downloads and unpacks the Debian package; returns the unpacked folder."""
    target = Path(folder) / package
    target.mkdir()
    _run(["apt-get", "download", package], target, package)
    archives = list(target.glob("*.deb"))
    if len(archives) != 1:
        raise BuildError(f"apt-get download left {len(archives)} archives of {package}, not one")
    _run(["dpkg-deb", "-x", str(archives[0]), str(target)], target, package)
    return target


def make_files(wordnet_folder: Path, jargon_file: Path, sizes: Sizes = DEFAULT_SIZES) -> Files:
    """Returns the lines of every file, by path relative to the sample folder."""
    pairs = find_pairs(read_wordnet(wordnet_folder), sizes.most_negatives)
    entries = _distinct_entries(read_jargon(jargon_file))
    if not pairs or not entries:
        empty = jargon_file if pairs else wordnet_folder
        raise BuildError(f"no usable text in {empty}: check that it is the right file")
    held_out_pairs = _choose_held_out_pairs(pairs, sizes)
    held_out_entries = _choose_entries(
        [entry for entry in entries if is_held_out(entry.headword)], sizes.held_out_entries
    )
    train_pairs = _choose_train_pairs(pairs, held_out_pairs, sizes)
    train_entries = [entry for entry in entries if not is_held_out(entry.headword)]
    return {
        **_side("train", train_pairs, train_entries, sizes.train_chats, sizes.train_jargon_chats),
        **_side(
            "held_out",
            held_out_pairs,
            held_out_entries,
            sizes.held_out_chats,
            sizes.held_out_jargon_chats,
        ),
    }


def write_files(files: Files, output: Path) -> None:
    """Writes all files to a temporary folder first, so that a failure keeps the old ones."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".sample-") as aside:
        for name, lines in files.items():
            path = Path(aside) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(compress(lines))
        for name in files:
            (output / name).parent.mkdir(exist_ok=True)
            os.replace(Path(aside) / name, output / name)


def compress(lines: Iterable[Line]) -> bytes:
    """Returns gzipped JSONL without the time and name that gzip adds."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    buffer = io.BytesIO()
    with gzip.GzipFile("", "wb", compresslevel=9, fileobj=buffer, mtime=0) as archive:
        archive.write(text.encode("utf-8"))
    return buffer.getvalue()


def _choose_held_out_pairs(pairs: list[SensePair], sizes: Sizes) -> list[SensePair]:
    """Returns held-out pairs of fairly common words, without repeated definitions or sentences."""
    common = [
        pair
        for pair in pairs
        if is_held_out(pair.word) and pair.tag_count >= sizes.held_out_least_tag_count
    ]
    by_query = {_query_text(pair): pair for pair in common}
    chosen: list[SensePair] = []
    seen: set[str] = set()
    pairs_per_word: Counter[str] = Counter()
    for query in _word_by_word(by_query):
        pair = by_query[query]
        is_full = pairs_per_word[term_key(pair.word)] == sizes.held_out_pairs_per_word
        if is_full or seen & {pair.definition, pair.sentence}:
            continue
        seen |= {pair.definition, pair.sentence}
        pairs_per_word[term_key(pair.word)] += 1
        chosen.append(pair)
    return chosen[: sizes.held_out_pairs]


def _word_by_word(by_query: dict[str, SensePair]) -> list[str]:
    """Returns the queries in a stable order, grouped by word.

    Grouping makes the senses of a word included or excluded together.
    """

    def word_hash(query: str) -> int:
        return stable_number(term_key(by_query[query].word))

    return sorted(in_stable_order(by_query), key=word_hash)


def _choose_train_pairs(
    pairs: list[SensePair], held_out: list[SensePair], sizes: Sizes
) -> list[SensePair]:
    """Returns pairs of the most common words that do not overlap with held-out pairs."""
    definitions = {pair.definition for pair in held_out}
    sentences = {pair.sentence for pair in held_out}
    by_query: dict[str, SensePair] = {}
    for pair in sorted(pairs, key=lambda pair: (-pair.tag_count, pair.word, pair.sentence)):
        others = tuple(each for each in pair.other_definitions if each not in definitions)
        is_known = pair.definition in definitions or pair.sentence in sentences
        # A sentence listed for two senses of its word does not distinguish them.
        is_new = _query_text(pair) not in by_query
        if others and is_new and not is_known and not is_held_out(pair.word):
            by_query[_query_text(pair)] = SensePair(
                pair.word, pair.sentence, pair.definition, others, pair.tag_count
            )
    return list(by_query.values())[: sizes.train_pairs]


def _distinct_entries(entries: list[Entry]) -> list[Entry]:
    """Removes entries whose headword or masked text occurred before."""
    by_headword = {entry.headword: entry for entry in reversed(entries)}
    return list({entry.masked_text: entry for entry in by_headword.values()}.values())


def _choose_entries(entries: list[Entry], most: int) -> list[Entry]:
    by_headword = {entry.headword: entry for entry in entries}
    return [by_headword[headword] for headword in in_stable_order(by_headword)[:most]]


def _side(
    side: str, pairs: list[SensePair], entries: list[Entry], chats: int, jargon_chats: int
) -> Files:
    """Returns the four files of one split."""
    # Sorting puts equal words and definitions close together, which helps gzip.
    pairs = sorted(pairs, key=lambda pair: (pair.word.lower(), pair.definition, pair.sentence))
    entries = sorted(entries, key=lambda entry: (entry.headword.lower(), entry.headword))
    chat_pairs = _choose_chat_pairs(pairs, chats)
    headwords = {entry.headword for entry in _choose_entries(entries, jargon_chats)}
    return {
        f"{side}/wordnet_senses.jsonl.gz": [_sense_line(pair) for pair in pairs],
        f"{side}/jargon_entries.jsonl.gz": [_entry_line(entry) for entry in entries],
        f"{side}/wordnet_chat.jsonl.gz": [_sense_chat(pair) for pair in chat_pairs],
        f"{side}/jargon_chat.jsonl.gz": [
            _entry_chat(entry) for entry in entries if entry.headword in headwords
        ],
    }


def _choose_chat_pairs(pairs: list[SensePair], most: int) -> list[SensePair]:
    """Returns at most `most` pairs, in order, without repeated definitions."""
    by_query = {_query_text(pair): pair for pair in pairs}
    by_definition: dict[str, str] = {}
    for query in in_stable_order(by_query):
        by_definition.setdefault(by_query[query].definition, query)
    chosen = set(list(by_definition.values())[:most])
    return [pair for query, pair in by_query.items() if query in chosen]


def _query_text(pair: SensePair) -> str:
    return f"{pair.word}: {pair.sentence}"


def _sense_line(pair: SensePair) -> Line:
    negatives = [["", definition] for definition in pair.other_definitions]
    query = [WORDNET_INSTRUCTION, _query_text(pair)]
    return {"query": query, "pos": [["", pair.definition]], "neg": negatives}


def _entry_line(entry: Entry) -> Line:
    query = [JARGON_INSTRUCTION, entry.headword]
    return {"query": query, "pos": [["", entry.masked_text]], "neg": []}


def _sense_chat(pair: SensePair) -> Line:
    wording = pick(WORDNET_QUESTIONS, _query_text(pair))
    return {"text": [wording.format(word=pair.word, sentence=pair.sentence), pair.definition]}


def _entry_chat(entry: Entry) -> Line:
    wording = pick(JARGON_QUESTIONS, entry.headword)
    return {"text": [wording.format(word=entry.headword), entry.text]}


def _run(command: list[str], folder: Path, package: str) -> None:
    """Runs a command for a package; errors name both."""
    failed = f"cannot get the Debian package {package}: "
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        advice = "pass --wordnet and --jargon to use local files"
        raise BuildError(f"{failed}{command[0]} is not installed; {advice}") from error
    except subprocess.CalledProcessError as error:
        shown = " ".join(command)
        raise BuildError(f"{failed}{shown} failed: {error.stderr.strip()}") from error


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the embedded sample of real text.")
    parser.add_argument(
        "--output", type=Path, default=SAMPLE_FOLDER, help="output folder (default: in place)"
    )
    parser.add_argument("--wordnet", type=Path, help="folder with WordNet 3.0's data.noun etc.")
    parser.add_argument("--jargon", type=Path, help="jargon.dict.dz, next to jargon.index")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
