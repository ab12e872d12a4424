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


@pytest.mark.parametrize(("rank", "gain"), [(10, 1 / math.log2(11)), (11, 0)])
def test_the_tenth_place_is_the_last_that_counts(rank, gain):
    measures = retrieval_measures(-np.arange(20.0)[None], [{rank - 1}])
    assert measures["ndcg_at_10"] == pytest.approx(gain)


def test_more_answers_than_ten_can_still_be_perfect():
    measures = retrieval_measures(-np.arange(20.0)[None], [set(range(12))])
    assert measures["ndcg_at_10"] == pytest.approx(1)


def test_an_answer_stands_behind_those_it_ties_with_but_not_behind_other_answers():
    scores = np.array([[5.0, 3.0, 3.0, 3.0, 1.0]])
    for answer in (1, 2, 3):
        measures = retrieval_measures(scores, [{answer}])
        assert measures["ndcg_at_10"] == pytest.approx(1 / math.log2(5))
    of_ranks = [1 / math.log2(1 + rank) for rank in (1, 2, 3, 4)]
    measures = retrieval_measures(scores, [{1, 2, 3}])
    assert measures["ndcg_at_10"] == pytest.approx(sum(of_ranks[1:]) / sum(of_ranks[:3]))


def test_bm25_finds_shared_words_and_gives_nothing_for_unknown_ones():
    passages = ["a large grey animal with a trunk", "a small vessel on the sea", "grey paint"]
    scores = bm25_scores(["the vessel sank in the sea", "zyzzyva"], passages)
    assert scores.shape == (2, 3)
    assert np.argmax(scores[0]) == 1 and scores[0, 0] == 0
    assert not scores[1].any()
