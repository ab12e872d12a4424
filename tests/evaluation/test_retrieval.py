"""Measures of retrieval by hand, and a baseline that finds what it should."""

import math

import numpy as np
import pytest

from grit_jax.evaluation.retrieval import bm25_scores, retrieval_measures


def test_measures_of_known_ranks():
    scores = -np.tile(np.arange(20.0), (3, 1))  # Passage p has rank p.
    measures = retrieval_measures(scores, [{0}, {2}, {15}])
    assert measures["ndcg_at_10"] == pytest.approx((1 + 1 / math.log2(4) + 0) / 3)
    assert measures["recall_at_1"] == pytest.approx(1 / 3)


def test_several_answers_are_held_against_the_best_order():
    scores = -np.tile(np.arange(20.0), (2, 1))
    measures = retrieval_measures(scores, [{0, 1}, {0, 3}])
    ideal = 1 + 1 / math.log2(3)
    assert measures["ndcg_at_10"] == pytest.approx((1 + (1 + 1 / math.log2(5)) / ideal) / 2)
    assert measures["recall_at_1"] == pytest.approx(0.5)


def test_a_constant_score_earns_nothing():
    measures = retrieval_measures(np.ones((4, 30)), [{n} for n in range(4)])
    assert measures == {"ndcg_at_10": 0.0, "recall_at_1": 0.0}


def test_bm25_finds_shared_words_and_gives_nothing_for_unknown_ones():
    passages = ["a large grey animal with a trunk", "a small vessel on the sea", "grey paint"]
    scores = bm25_scores(["the vessel sank in the sea", "zyzzyva"], passages)
    assert scores.shape == (2, 3)
    assert np.argmax(scores[0]) == 1 and scores[0, 0] == 0
    assert not scores[1].any()
