"""Measures of retrieval, and the lexical baseline they stand beside.

Legend of dimensions: Q queries, P passages.
"""

from collections.abc import Sequence
import logging
import math
from typing import Any

from jaxtyping import Float
import numpy as np


def retrieval_measures(
    scores: Float[np.ndarray, "Q P"], relevant: Sequence[set[int]]
) -> dict[str, float]:
    """Returns the mean nDCG@10 and recall@1 over queries.

    Args:
      scores: how well each passage fits each query; higher is better. A passage that ties with
        others is taken to stand behind them, so that a constant score earns nothing; nor does one
        that is not a number.
      relevant: for each query the numbers of the passages that answer it, at least one.
    """
    gains, recalls = [], []
    for row, answers in zip(scores, relevant, strict=True):
        ranks = _pessimistic_ranks(row, answers)
        ideal = sum(1 / np.log2(2 + rank) for rank in range(min(10, len(answers))))
        gains.append(sum(1 / np.log2(2 + rank) for rank in ranks if rank < 10) / ideal)
        recalls.append(sum(rank < 1 for rank in ranks) / len(answers))
    return {"ndcg_at_10": float(np.mean(gains)), "recall_at_1": float(np.mean(recalls))}


def chance_measures(num_passages: int) -> dict[str, float]:
    """Returns what a random order of so many passages earns on average, with one answer a query."""
    gain = sum(1 / math.log2(2 + rank) for rank in range(min(10, num_passages)))
    return {"ndcg_at_10": gain / num_passages, "recall_at_1": 1 / num_passages}


def _pessimistic_ranks(row: np.ndarray, answers: set[int]) -> list[int]:
    """Returns the ranks from 0 on of the answers, each behind all others with the same score."""
    is_answer = np.zeros(len(row), bool)
    is_answer[list(answers)] = True
    own = -np.sort(-row[is_answer])  # What is not a number comes last.
    others = row[~is_answer]
    return [place + int(np.count_nonzero(~(others < score))) for place, score in enumerate(own)]


def bm25_scores(queries: Sequence[str], passages: Sequence[str]) -> Float[np.ndarray, "Q P"]:
    """Returns the BM25 scores (k1 1.5, b 0.75) of all passages, English stop words left out.

    Raises:
      ImportError: the package bm25s is not installed (`pip install 'grit-jax[eval]'`).
    """
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # It prints debug messages by default.

    def words(texts: Sequence[str]) -> Any:
        return bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)

    index, words_of_passages = bm25s.BM25(), words(passages)
    if not any(words_of_passages):  # Such as "A" and "B": nothing to index.
        return np.zeros((len(queries), len(passages)))
    index.index(words_of_passages, show_progress=False)
    known = index.vocab_dict
    rows = []
    for query in words(queries):
        found = [word for word in query if word in known]
        rows.append(index.get_scores(found) if found else np.zeros(len(passages)))
    return np.stack(rows)
