"""Evaluation measures, given a function that embeds, scores or generates.

Measures map a name, "dataset/measure", to a number. `experiments.gritlm` has the functions for
GritLM models, `experiments.baselines` for the baselines.

Legend of dimensions: N texts, D embedding, Q queries, P passages.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxtyping import Float
import numpy as np
from rich.table import Table

from experiments.datasets import DATASETS
from experiments.files import SUFFIX, Line, read_lines
from grit_jax.evaluation.retrieval import retrieval_metrics

# Maps texts and an instruction to float32 embeddings.
Encode = Callable[[Sequence[str], str], Float[np.ndarray, "N D"]]
# Maps an instruction, queries and passages to scores; higher is better.
Score = Callable[[str, Sequence[str], Sequence[str]], Float[np.ndarray, "Q P"]]
# Maps (user, assistant) chats to the log-likelihood of the assistant's turn in nats, and to its
# number of tokens.
Likelihoods = Callable[
    [Sequence[tuple[str, str]]], tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]
]
# Maps user turns to answers.
Generate = Callable[[Sequence[str]], Sequence[str]]
Measures = dict[str, float]

TITLES = {
    "ndcg_at_10": "nDCG@10",
    "recall_at_1": "recall@1",
    "hard_negatives": "hard negatives",
    "accuracy": "accuracy",
    "accuracy_per_character": "per character",
    "exact_match": "exact match",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
}


def by_embeddings(encode: Encode) -> Score:
    """Returns a function that scores by the dot product of embeddings."""

    def score(
        instruction: str, queries: Sequence[str], passages: Sequence[str]
    ) -> Float[np.ndarray, "Q P"]:
        return encode(queries, instruction) @ encode(passages, "").T

    return score


def measure_retrieval(score: Score, folder: Path) -> Measures:
    """Returns nDCG@10 and recall@1 of each corpus, and the accuracy against hard negatives.

    The latter is the fraction of queries whose passage scores above all of the query's hard
    negatives, the definitions of a word's other senses.

    Args:
      score: see `Score`; `by_embeddings` makes one from an embedding function.
      folder: output of `experiments.build_data`.
    """
    measures: Measures = {}
    for dataset in filter(lambda dataset: dataset.passages, DATASETS):
        corpus = folder / "evaluation" / "corpora" / dataset.embedding_name
        documents = [line["text"] for line in read_lines(corpus / f"documents{SUFFIX}")]
        queries = read_lines(corpus / f"queries{SUFFIX}")
        texts = [query["text"] for query in queries]
        scores = score(dataset.instruction, texts, documents)
        relevant = [set(query["relevant"]) for query in queries]
        found = retrieval_metrics(scores, relevant)
        hard = [query for query in queries if query["negatives"]]
        if hard:
            found["hard_negatives"] = _above_negatives(score, dataset.instruction, hard, documents)
        measures |= {f"{dataset.embedding_name}/{name}": value for name, value in found.items()}
    return measures


def measure_choices(likelihoods: Likelihoods, folder: Path) -> Measures:
    """Returns the accuracy of choosing the definition of a word in a sentence by likelihood.

    "accuracy" compares the log-likelihoods of the choices; "accuracy_per_character" divides them
    by the length of the choice.
    """
    items = read_lines(folder / "evaluation" / f"wordnet_choices{SUFFIX}")
    chats = [(item["question"], choice) for item in items for choice in item["choices"]]
    nats, _ = likelihoods(chats)
    lengths = np.array([len(answer) for _, answer in chats])
    return {
        "wordnet_choices/accuracy": _accuracy(items, nats),
        "wordnet_choices/accuracy_per_character": _accuracy(items, nats / lengths),
    }


def measure_reasoning(generate: Generate, folder: Path) -> Measures:
    """Returns the exact match of answers to tasks, overall and by kind of task.

    Surrounding white space and a final period are ignored.
    """
    items = read_lines(folder / "evaluation" / f"reasoning_items{SUFFIX}")
    answers = generate([item["question"] for item in items])
    right = [
        _bare(answer) == _bare(item["answer"]) for answer, item in zip(answers, items, strict=True)
    ]
    kinds = np.array([item["kind"] for item in items])
    measures = {"reasoning/exact_match": float(np.mean(right))}
    for kind in np.unique(kinds):
        measures[f"{kind}/exact_match"] = float(np.mean(np.array(right)[kinds == kind]))
    return measures


def measure_perplexity(likelihoods: Likelihoods, folder: Path) -> Measures:
    """Returns perplexity and bits per byte of the assistant's turns, overall and by dataset.

    Bits per byte do not depend on the tokenizer.
    """
    measures: Measures = {}
    everything: list[np.ndarray] = []
    for dataset in DATASETS:
        lines = read_lines(folder / "held_out" / f"{dataset.chat_name}{SUFFIX}")
        chats = [(line["text"][0], line["text"][1]) for line in lines]
        nats, tokens = likelihoods(chats)
        num_bytes = sum(len(answer.encode()) for _, answer in chats)
        totals = np.array([-np.sum(nats), np.sum(tokens), num_bytes], np.float64)
        everything.append(totals)
        measures |= _named(dataset.chat_name, totals)
    return measures | _named("all_chats", np.sum(everything, axis=0))


def measures_table(columns: Mapping[str, Measures]) -> Table:
    """Returns a printable table of measures, with one column per model."""
    table = Table()
    table.add_column("dataset", no_wrap=True)
    table.add_column("measure")
    for title in columns:
        table.add_column(title, justify="right")
    for name in dict.fromkeys(name for measures in columns.values() for name in measures):
        dataset, measure = name.split("/")
        cells = [measures.get(name) for measures in columns.values()]
        texts = ["" if cell is None else shown(cell) for cell in cells]
        table.add_row(dataset, TITLES[measure], *texts)
    return table


def shown(value: float) -> str:
    """Formats a measure: three decimals, or one from 10 on."""
    return f"{value:.3f}" if value < 10 else f"{value:,.1f}"


def _above_negatives(
    score: Score, instruction: str, queries: Sequence[Line], documents: Sequence[str]
) -> float:
    """Returns the fraction of queries whose passage scores above all of their negatives."""
    answers = [documents[int(query["relevant"][0])] for query in queries]
    passages = {*answers, *(text for query in queries for text in query["negatives"])}
    columns = {text: column for column, text in enumerate(sorted(passages))}
    scores = score(instruction, [query["text"] for query in queries], list(columns))
    right = [
        all(row[columns[answer]] > row[columns[text]] for text in query["negatives"])
        for row, query, answer in zip(scores, queries, answers, strict=True)
    ]
    return float(np.mean(right))


def _accuracy(items: Sequence[Line], scores: np.ndarray) -> float:
    """Returns the fraction of items whose answer scores above all other choices."""
    right, start = 0, 0
    for item in items:
        own = scores[start : start + len(item["choices"])]
        right += bool(np.all(own[item["answer"]] > np.delete(own, item["answer"])))
        start += len(own)
    return right / len(items)


def _named(dataset: str, totals: np.ndarray) -> Measures:
    nats, tokens, num_bytes = totals
    return {
        f"{dataset}/perplexity": float(np.exp(nats / tokens)),
        f"{dataset}/bits_per_byte": float(nats / np.log(2) / num_bytes),
    }


def _bare(answer: str) -> str:
    return answer.strip().removesuffix(".")
