"""Retrieval metrics computed by hand, the BM25 baseline, and held-out data."""

import math

import jax
import numpy as np
import optax
from prepared_data import chat_examples, embedding_examples, open_datasets, write_prepared
import pytest

from grit_jax.data.manifest import PreparedDataError
from grit_jax.evaluation.held_out import HeldOut, RetrievalTask, TextBatcher
from grit_jax.evaluation.retrieval import bm25_scores, retrieval_metrics
from grit_jax.models import ModelConfig
from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.sharding import make_mesh
from grit_jax.text.examples import EmbeddingExample, Text
from grit_jax.training.joint_loss import LossConfig, make_joint_loss
from grit_jax.training.train_step import Trainer


def test_measures_of_known_ranks():
    scores = -np.tile(np.arange(20.0), (3, 1))  # Passage p has rank p.
    metrics = retrieval_metrics(scores, [{0}, {2}, {15}])
    assert metrics["ndcg_at_10"] == pytest.approx((1 + 1 / math.log2(4) + 0) / 3)
    assert metrics["recall_at_1"] == pytest.approx(1 / 3)


def test_several_answers_are_held_against_the_best_order():
    scores = -np.tile(np.arange(20.0), (2, 1))
    metrics = retrieval_metrics(scores, [{0, 1}, {0, 3}])
    ideal = 1 + 1 / math.log2(3)
    assert metrics["ndcg_at_10"] == pytest.approx((1 + (1 + 1 / math.log2(5)) / ideal) / 2)
    assert metrics["recall_at_1"] == pytest.approx(0.5)


def test_a_constant_score_earns_nothing():
    metrics = retrieval_metrics(np.ones((4, 30)), [{n} for n in range(4)])
    assert metrics == {"ndcg_at_10": 0.0, "recall_at_1": 0.0}


def test_embeddings_that_are_no_numbers_earn_nothing():
    metrics = retrieval_metrics(np.full((4, 30), np.nan), [{n} for n in range(4)])
    assert metrics == {"ndcg_at_10": 0.0, "recall_at_1": 0.0}
    scores = np.array([[np.nan, 2.0, 1.0]])  # Nor does a passage win because another is none.
    assert retrieval_metrics(scores, [{1}])["recall_at_1"] == 0.0
    assert retrieval_metrics(scores[:, ::2], [{0, 1}])["ndcg_at_10"] == 1.0


@pytest.mark.parametrize(("rank", "gain"), [(10, 1 / math.log2(11)), (11, 0)])
def test_the_tenth_place_is_the_last_that_counts(rank, gain):
    metrics = retrieval_metrics(-np.arange(20.0)[None], [{rank - 1}])
    assert metrics["ndcg_at_10"] == pytest.approx(gain)


def test_more_answers_than_ten_can_still_be_perfect():
    metrics = retrieval_metrics(-np.arange(20.0)[None], [set(range(12))])
    assert metrics["ndcg_at_10"] == pytest.approx(1)


def test_an_answer_stands_behind_those_it_ties_with_but_not_behind_other_answers():
    scores = np.array([[5.0, 3.0, 3.0, 3.0, 1.0]])
    for answer in (1, 2, 3):
        metrics = retrieval_metrics(scores, [{answer}])
        assert metrics["ndcg_at_10"] == pytest.approx(1 / math.log2(5))
    of_ranks = [1 / math.log2(1 + rank) for rank in (1, 2, 3, 4)]
    metrics = retrieval_metrics(scores, [{1, 2, 3}])
    assert metrics["ndcg_at_10"] == pytest.approx(sum(of_ranks[1:]) / sum(of_ranks[:3]))


def test_bm25_finds_shared_words_and_gives_nothing_for_unknown_ones():
    passages = ["a large grey animal with a trunk", "a small vessel on the sea", "grey paint"]
    scores = bm25_scores(["the vessel sank in the sea", "zyzzyva"], passages)
    assert scores.shape == (2, 3)
    assert np.argmax(scores[0]) == 1 and scores[0, 0] == 0
    assert not scores[1].any()
    assert not bm25_scores(["the vessel", "A"], ["A", "the"]).any()  # Passages without a word.


def make_trainer():
    mesh = make_mesh(devices=jax.devices()[:1])
    return Trainer(ModelConfig(), make_joint_loss(LossConfig()), optax.sgd(0.1), mesh)


@pytest.fixture
def held_out(tmp_path):
    """Makes held-out data of pairs and chats, in rows of some length."""
    random, trainer = np.random.default_rng(0), make_trainer()
    write_prepared(tmp_path, "pairs", embedding_examples(random, 20, 12))
    write_prepared(tmp_path, "chats", chat_examples(random, 20, 24))

    def make(query=12, passage=12, chat=24):
        names = {"embedding": "pairs", "generative": "chats"}
        datasets = {kind: list(open_datasets(tmp_path, {n: 1.0})) for kind, n in names.items()}
        lengths = {"query": query, "passage": passage, "chat": chat}
        return HeldOut(trainer, datasets, lengths, 4, EmbeddingSpec())

    return make


def test_a_query_in_several_lines_is_one_query_with_the_positives_of_all(tmp_path):
    query, other, *passages = (Text(np.array([n], np.int32), np.ones(1, bool)) for n in range(1, 6))
    lines = [(query, passages[:2]), (other, passages[1:2]), (query, passages[1:])]
    examples = [EmbeddingExample(query, positives, []) for query, positives in lines]
    write_prepared(tmp_path, "pairs", examples)
    task = RetrievalTask.of(next(iter(open_datasets(tmp_path, {"pairs": 1.0}))))
    assert [text.tokens.tolist() for text in task.queries] == [[1], [2]]
    assert [text.tokens.tolist() for text in task.passages] == [[3], [4], [5]]
    assert task.relevant == [{0, 1, 2}, {1}]


@pytest.mark.parametrize("stream", ["query", "passage", "chat"])
def test_a_text_that_is_longer_than_a_row_is_named_at_the_start(held_out, stream):
    with pytest.raises(PreparedDataError, match=rf"config.data.{stream}_row_length=5 is shorter"):
        held_out(**{stream: 5})


def test_one_batch_at_a_time_is_on_the_devices():
    chats = [example.chat for example in chat_examples(np.random.default_rng(0), 20, 24)]
    batcher = TextBatcher(make_trainer(), EmbeddingSpec(), {"chat": 24}, batch_size=4)
    before, counts = len(jax.live_arrays()), []
    for batch in batcher.batches(chats, "chat"):
        counts.append(len(jax.live_arrays()) - before)
        arrays = len(jax.tree.leaves(batch))
        del batch
    assert counts == [arrays] * 5
