"""The files of the experiment: training and held-out datasets, and what is measured on."""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import gzip
import json
from pathlib import Path
import tempfile
from typing import Any

from experiments.datasets import DATASETS, FILLING, SMALLEST_CORPUS
from experiments.facts import Dataset, Fact, normalised
from experiments.split import Split
from tools.sample.build import WORDNET_QUESTIONS, compress
from tools.sample.text import pick, stable_number

SUFFIX = ".jsonl.gz"
NUM_CHOICES = 4
Line = dict[str, Any]


@contextlib.contextmanager
def folder_aside(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `folder` when all has gone well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
        new, old = Path(aside) / "new", Path(aside) / "old"
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)


def write_datasets(split: Split, folder: Path) -> None:
    """Writes `train` and `held_out`, a file for each dataset, as `grit-jax prepare` takes them."""
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
    """Writes the corpora with their queries, and the items with one right answer."""
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
    """Returns a line of GritLM's form, with the keys that the fact was split by."""
    return {
        "query": [dataset.instruction, fact.query],
        "pos": [["", fact.passage]],
        "neg": [["", text] for text in fact.negatives],
        "keys": list(fact.keys),
    }


def chat_line(fact: Fact) -> Line:
    """Returns a line of GritLM's form, with the keys that the fact was split by."""
    return {"text": [fact.user, fact.assistant], "keys": list(fact.keys)}


def make_corpus(
    dataset: Dataset, facts: Sequence[Fact], filling: Sequence[Fact]
) -> tuple[list[Line], list[Line]]:
    """Returns documents and queries; a query's "relevant" are the numbers of its documents.

    Where there are fewer than `SMALLEST_CORPUS` documents, passages of `filling` are added that
    are about something else.
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
    """Returns questions after a word in a sentence, each with four definitions.

    The wrong ones are what the word means elsewhere, and, where it has fewer senses, what other
    held-out words mean.
    """
    items = []
    for number, fact in enumerate(facts):
        others = [other.passage for other in (*facts[number + 1 :], *facts[:number])]
        wrong: dict[str, str] = {}
        for text in (*fact.negatives, *others):
            if normalised(text) != normalised(fact.passage) and len(wrong) < NUM_CHOICES - 1:
                wrong.setdefault(normalised(text), text)
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
    """Writes a compressed file of lines, the same bytes for the same lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compress(lines))


def read_lines(path: Path) -> list[Line]:
    """Returns the objects of a file of lines.

    Raises:
      FileNotFoundError: there is no such file; the message says how to make it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: make it with python -m experiments.build_data")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _in_stable_order(choices: list[str], query: str) -> list[str]:
    return sorted(choices, key=lambda text: stable_number(f"choice {query} {text}"))
