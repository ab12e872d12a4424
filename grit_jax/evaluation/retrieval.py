"""Retrieval metrics, and BM25 as a lexical baseline.

Legend of dimensions: Q queries, P passages.
"""

from collections.abc import Sequence
import logging
import math
from typing import Any

from jaxtyping import Float
import numpy as np


def retrieval_metrics(
    scores: Float[np.ndarray, "Q P"], relevant: Sequence[set[int]]
) -> dict[str, float]:
    """Returns the mean nDCG@10 and recall@1 over queries.

    Args:
      scores: the score of each passage for each query; higher is better. A relevant passage ranks
        below all other passages with the same score, so that constant scores are rated as a
        worst case. NaN is the lowest score.
      relevant: the indices of each query's relevant passages, at least one for each query.
    """
    gains, recalls = [], []
    for row, passages in zip(scores, relevant, strict=True):
        ranks = _pessimistic_ranks(row, passages)
        ideal = sum(1 / np.log2(2 + rank) for rank in range(min(10, len(passages))))
        gains.append(sum(1 / np.log2(2 + rank) for rank in ranks if rank < 10) / ideal)
        recalls.append(sum(rank < 1 for rank in ranks) / len(passages))
    return {"ndcg_at_10": float(np.mean(gains)), "recall_at_1": float(np.mean(recalls))}


def chance_metrics(num_passages: int) -> dict[str, float]:
    """Returns the expected metrics of a random order, with one relevant passage for each query."""
    gain = sum(1 / math.log2(2 + rank) for rank in range(min(10, num_passages)))
    return {"ndcg_at_10": gain / num_passages, "recall_at_1": 1 / num_passages}


def _pessimistic_ranks(row: np.ndarray, relevant: set[int]) -> list[int]:
    """Returns the ranks of the relevant passages, from 0, below other passages that tie."""
    is_relevant = np.zeros(len(row), bool)
    is_relevant[list(relevant)] = True
    own = -np.sort(-row[is_relevant])  # Descending, NaN last.
    others = row[~is_relevant]
    return [rank + int(np.count_nonzero(~(others < score))) for rank, score in enumerate(own)]


def bm25_scores(queries: Sequence[str], passages: Sequence[str]) -> Float[np.ndarray, "Q P"]:
    """Returns the BM25 scores (k1 1.5, b 0.75) of all passages, without English stop words.

    Raises:
      ImportError: the package bm25s is not installed (`pip install 'grit-jax[eval]'`).
    """
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # It prints debug messages by default.

    def words(texts: Sequence[str]) -> Any:
        return bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)

    index, passage_words = bm25s.BM25(), words(passages)
    if not any(passage_words):  # bm25s cannot index passages of stop words only.
        return np.zeros((len(queries), len(passages)))
    index.index(passage_words, show_progress=False)
    rows = []
    for query in words(queries):
        known = [word for word in query if word in index.vocab_dict]
        rows.append(index.get_scores(known) if known else np.zeros(len(passages)))
    return np.stack(rows)
