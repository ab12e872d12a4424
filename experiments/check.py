"""Checks in the written files that training data contains nothing held out."""

from collections.abc import Iterator
from pathlib import Path

from experiments.facts import normalize_words
from experiments.files import SUFFIX, Line, read_lines
from experiments.split import Texts, query_text

# Texts that share this many consecutive words share a sentence.
RUN_LENGTH = 8


class LeakError(AssertionError):
    """Held-out data is in the training files; the message says what and where."""


def check_folder(folder: Path) -> dict[str, float]:
    """Searches the training files of both streams for held-out keys, questions and texts.

    Texts are compared by words, and also found within longer texts.

    Returns:
      For each held-out dataset, the fraction of passages that share eight consecutive words with a
      training text, such as phrases common to similar packages.

    Raises:
      LeakError: something was found.
    """
    held_out = _read(folder / "held_out")
    keys = {key for lines in held_out.values() for line in lines for key in line["keys"]}
    questions = {text for lines in held_out.values() for line in lines for text in _questions(line)}
    secret = Texts(text for lines in held_out.values() for line in lines for text in _told(line))
    runs: set[tuple[str, ...]] = set()
    for name, lines in _read(folder / "train").items():
        for number, line in enumerate(lines, 1):
            where = f"line {number} of train/{name}"
            for key in keys.intersection(line["keys"]):
                raise LeakError(f"{where} has a held-out key: {key}")
            for question in questions.intersection(_questions(line)):
                raise LeakError(f"{where} has a held-out question: {question}")
            for text in _texts(line):
                if found := secret.found_in(text):
                    raise LeakError(f"{where} contains a held-out text: {found.strip()}")
                runs.update(_runs(text))
    return {
        name.removesuffix(SUFFIX): _fraction_with_runs(lines, runs)
        for name, lines in held_out.items()
        if "pos" in lines[0]
    }


def _read(folder: Path) -> dict[str, list[Line]]:
    return {path.name: read_lines(path) for path in sorted(folder.glob(f"*{SUFFIX}"))}


def _told(line: Line) -> Iterator[str]:
    """Yields the texts of a held-out line; none for tasks, which their key covers."""
    if "query" in line:
        yield query_text(line["query"][1], line["keys"])
        yield from (text for _, text in line["pos"] + line["neg"])
    elif not _is_task(line):
        yield from line["text"]


def _is_task(line: Line) -> bool:
    return line["keys"][0].partition(" ")[0] not in ("term", "package", "question")


def _questions(line: Line) -> list[str]:
    question = line["query"][1] if "query" in line else line["text"][0]
    return [question.casefold()]


def _texts(line: Line) -> list[str]:
    if "text" in line:
        return line["text"]
    return [line["query"][1], *(text for _, text in line["pos"] + line["neg"])]


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = normalize_words(text).split()
    return zip(*(words[offset:] for offset in range(RUN_LENGTH)), strict=False)


def _fraction_with_runs(lines: list[Line], runs: set[tuple[str, ...]]) -> float:
    passages = [line["pos"][0][1] for line in lines]
    return sum(any(run in runs for run in _runs(text)) for text in passages) / len(passages)
