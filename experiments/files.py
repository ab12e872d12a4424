"""The files of the experiment: training, held-out and evaluation data."""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import gzip
import json
from pathlib import Path
import tempfile
from typing import Any

from experiments.datasets import DATASETS, FILLING, SMALLEST_CORPUS
from experiments.facts import Dataset, Fact, normalize_words
from experiments.split import Split
from tools.sample.build import WORDNET_QUESTIONS, compress
from tools.sample.text import pick, stable_number

SUFFIX = ".jsonl.gz"
NUM_CHOICES = 4
Line = dict[str, Any]


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces `folder` if the block succeeds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
        new, old = Path(aside) / "new", Path(aside) / "old"
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)


def write_datasets(split: Split, folder: Path) -> None:
    """Writes the folders `train` and `held_out`, one file per dataset, for `grit-jax prepare`."""
    for side, facts in (("train", split.train), ("held_out", split.held_out)):
        for dataset in DATASETS:
            own = facts[dataset.name]
            if dataset.passages:
                lines = [embedding_line(dataset, fact) for fact in own]
                write_lines(folder / side / f"{dataset.embedding_name}{SUFFIX}", lines)
            chatted = own[: dataset.most_chats] if side == "held_out" else own
            lines = [chat_line(fact) for fact in chatted]
            write_lines(folder / side / f"{dataset.chat_name}{SUFFIX}", lines)


def write_evaluation(split: Split, folder: Path) -> None:
    """Writes the corpora with their queries, the multiple-choice items and the tasks."""
    held_out = split.held_out
    for dataset in filter(lambda dataset: dataset.passages, DATASETS):
        corpus, queries = make_corpus(dataset, held_out[dataset.name], held_out[FILLING])
        write_lines(folder / "corpora" / dataset.embedding_name / f"documents{SUFFIX}", corpus)
        write_lines(folder / "corpora" / dataset.embedding_name / f"queries{SUFFIX}", queries)
    items = multiple_choice_items(held_out["wordnet"])
    write_lines(folder / f"wordnet_choices{SUFFIX}", items)
    items = [
        {"question": fact.user, "answer": fact.assistant, "kind": fact.kind}
        for fact in held_out["reasoning"]
    ]
    write_lines(folder / f"reasoning_items{SUFFIX}", items)


def embedding_line(dataset: Dataset, fact: Fact) -> Line:
    """Returns a line in GritLM's format, with the keys used for the split."""
    return {
        "query": [dataset.instruction, fact.query],
        "pos": [["", fact.passage]],
        "neg": [["", text] for text in fact.negatives],
        "keys": list(fact.keys),
    }


def chat_line(fact: Fact) -> Line:
    """Returns a line in GritLM's format, with the keys used for the split."""
    return {"text": [fact.user, fact.assistant], "keys": list(fact.keys)}


def make_corpus(
    dataset: Dataset, facts: Sequence[Fact], filling: Sequence[Fact]
) -> tuple[list[Line], list[Line]]:
    """Returns documents and queries; "relevant" holds the indices of a query's documents.

    A corpus with fewer than `SMALLEST_CORPUS` documents is filled up with passages of `filling`
    that have other keys.
    """
    passages = {fact.passage: number for number, fact in enumerate(facts)}
    documents = [fact.passage for fact in facts]
    own_keys = {key for fact in facts for key in fact.keys}
    for fact in filling:
        if len(documents) < SMALLEST_CORPUS and not own_keys & set(fact.keys):
            documents.append(fact.passage)
    queries = [
        {
            "instruction": dataset.instruction,
            "text": fact.query,
            "relevant": [passages[fact.passage]],
            "negatives": list(fact.negatives),
        }
        for fact in facts
    ]
    return [{"text": text} for text in documents], queries


def multiple_choice_items(facts: Sequence[Fact]) -> list[Line]:
    """Returns questions about a word in a sentence, each with four definitions.

    Wrong choices are definitions of the word's other senses, then of other held-out words.
    """
    items = []
    for number, fact in enumerate(facts):
        others = [other.passage for other in (*facts[number + 1 :], *facts[:number])]
        wrong: dict[str, str] = {}
        for text in (*fact.negatives, *others):
            if (
                normalize_words(text) != normalize_words(fact.passage)
                and len(wrong) < NUM_CHOICES - 1
            ):
                wrong.setdefault(normalize_words(text), text)
        choices = _in_stable_order([fact.passage, *wrong.values()], fact.query)
        word, _, sentence = fact.query.partition(": ")
        question = pick(WORDNET_QUESTIONS, fact.query).format(word=word, sentence=sentence)
        items.append(
            {
                "question": question,
                "choices": choices,
                "answer": choices.index(fact.passage),
                "same_word": sum(text in fact.negatives for text in choices),
            }
        )
    return items


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    """Writes a gzipped JSONL file; equal lines give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compress(lines))


def read_lines(path: Path) -> list[Line]:
    """Reads a gzipped JSONL file.

    Raises:
      FileNotFoundError: the file does not exist; the message says how to build it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: build it with python -m experiments.build_data")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _in_stable_order(choices: list[str], query: str) -> list[str]:
    return sorted(choices, key=lambda text: stable_number(f"choice {query} {text}"))
