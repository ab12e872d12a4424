"""Measures of retrieval for ranks that one can count on one's fingers."""

import math

import numpy as np
import pytest

from grit_jax.evaluation.retrieval import bm25_scores, retrieval_measures


def gain(rank):
    """What an answer at this rank, from 1 on, adds to the cumulative gain."""
    return 1 / math.log2(rank + 1)


def descending(count):
    """Scores for which passage n has rank n + 1."""
    return -np.arange(count, dtype=float)


@pytest.mark.parametrize(
    ("rank", "ndcg", "recall"), [(1, 1, 1), (2, gain(2), 0), (10, gain(10), 0), (11, 0, 0)]
)
def test_one_answer_at_a_known_rank(rank, ndcg, recall):
    measures = retrieval_measures(descending(20)[None], [{rank - 1}])
    assert measures == {"ndcg_at_10": pytest.approx(ndcg), "recall_at_1": recall}


def test_several_answers_are_compared_to_the_best_order():
    measures = retrieval_measures(descending(20)[None], [{0, 3, 14}])
    expected = (gain(1) + gain(4)) / (gain(1) + gain(2) + gain(3))
    assert measures["ndcg_at_10"] == pytest.approx(expected)
    assert measures["recall_at_1"] == pytest.approx(1 / 3)


def test_more_answers_than_ten_can_still_be_perfect():
    measures = retrieval_measures(descending(20)[None], [set(range(12))])
    assert measures["ndcg_at_10"] == pytest.approx(1)


def test_queries_count_alike():
    scores = np.stack([descending(20), descending(20), descending(20)])
    measures = retrieval_measures(scores, [{0}, {1}, {15}])
    assert measures["ndcg_at_10"] == pytest.approx((1 + gain(2)) / 3)
    assert measures["recall_at_1"] == pytest.approx(1 / 3)


def test_a_constant_score_earns_nothing():
    measures = retrieval_measures(np.ones((2, 11)), [{0}, {10}])
    assert measures == {"ndcg_at_10": 0, "recall_at_1": 0}


def test_an_answer_stands_behind_those_it_ties_with():
    scores = np.array([[5.0, 3.0, 3.0, 3.0, 1.0]])
    for answer in (1, 2, 3):
        measures = retrieval_measures(scores, [{answer}])
        assert measures["ndcg_at_10"] == pytest.approx(gain(4))
    # Answers that tie with each other do not push each other back.
    assert retrieval_measures(scores, [{1, 2, 3}])["ndcg_at_10"] == pytest.approx(
        (gain(2) + gain(3) + gain(4)) / (gain(1) + gain(2) + gain(3))
    )


def test_scores_and_answers_must_belong_together():
    with pytest.raises(ValueError, match="argument"):
        retrieval_measures(np.ones((2, 3)), [{0}])


PASSAGES = [
    "a feline animal that catches mice",
    "a vehicle with two wheels and pedals",
    "the study of stars and planets",
    "a feline that lives in the savanna",
]


def test_bm25_finds_the_obvious_passage():
    pytest.importorskip("bm25s")
    scores = bm25_scores(["wheels with pedals", "planets", "feline mice"], PASSAGES)
    assert scores.shape == (3, 4)
    np.testing.assert_array_equal(scores.argmax(axis=1), [1, 2, 0])
    assert scores[2, 0] > scores[2, 3] > scores[2, 1] == 0


def test_bm25_gives_zeros_to_a_query_of_unknown_words():
    pytest.importorskip("bm25s")
    scores = bm25_scores(["quux", "planets", "the of and"], PASSAGES)
    assert not scores[0].any()
    assert scores[1].any()
    assert not scores[2].any()
