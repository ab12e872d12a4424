"""Retrieval metrics and perplexity of the model in training, on held-out data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any, Protocol

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float
import numpy as np

from grit_jax.arithmetic import round_up
from grit_jax.data.batch import PackedTexts
from grit_jax.data.batch_plan import check_row_length
from grit_jax.data.kinds import deduplicated_ids
from grit_jax.data.manifest import PreparedDataset, load_saved_tokenizer, text_fingerprint
from grit_jax.data.packing import pack, plan_rows
from grit_jax.evaluation.retrieval import bm25_scores, chance_metrics, retrieval_metrics
from grit_jax.objectives.embedding import EmbeddingSpec, embed_texts
from grit_jax.objectives.next_token import next_token_loss, shift_targets
from grit_jax.sharding import batch_shards
from grit_jax.text.examples import Text
from grit_jax.training.train_step import Trainer


@dataclasses.dataclass(frozen=True)
class TextBatcher:
    """Packs held-out texts into batches on the devices.

    Attributes:
      trainer: provides the model and the mesh.
      embedding: how texts are embedded.
      row_lengths: tokens per row of each stream.
      batch_size: texts per batch.
    """

    trainer: Trainer
    embedding: EmbeddingSpec
    row_lengths: Mapping[str, int]
    batch_size: int

    def check_rows(self, dataset: PreparedDataset, stream: str, texts: Sequence[Text]) -> None:
        """Checks that the texts of a dataset fit the rows of a stream.

        Raises:
          PreparedDataError: a text is longer than a row.
        """
        check_row_length(dataset, stream, max(map(len, texts)), self.row_lengths)

    def batches(self, texts: Sequence[Text], stream: str) -> Iterator[PackedTexts]:
        """Yields the texts in order, in batches of one shape; the last may have unused indices."""
        row_length, shards = self.row_lengths[stream], batch_shards(self.trainer.mesh)
        groups = [
            texts[start : start + self.batch_size]
            for start in range(0, len(texts), self.batch_size)
        ]
        plans = [plan_rows([len(text) for text in group], row_length) for group in groups]
        num_rows = round_up(max(len(plan) for plan in plans), shards)
        for group, plan in zip(groups, plans, strict=True):
            packed = pack(group, plan, num_rows, row_length, num_texts=self.batch_size)
            yield self.trainer.to_devices(packed)

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles a function, with results that every process can read."""
        return jax.jit(function, out_shardings=NamedSharding(self.trainer.mesh, PartitionSpec()))


class Evaluator(Protocol):
    """Computes metrics on the held-out datasets of one kind of text."""

    def __init__(self, datasets: Sequence[PreparedDataset], batcher: TextBatcher): ...

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics."""
        ...

    def evaluate(self, parameters: nnx.State) -> dict[str, float]:
        """Returns the metrics by name."""
        ...

    def trace(self, parameters: nnx.State) -> None:
        """Traces the programs of `evaluate`."""
        ...

    def chance(self) -> dict[str, float]:
        """Returns the expected metrics of a random answer, where they are known."""
        ...

    def bm25_baseline(self) -> dict[str, float]:
        """Returns the metrics of BM25, where it applies."""
        ...


@dataclasses.dataclass(frozen=True)
class RetrievalTask:
    """The queries of a held-out dataset, and their corpus: the positives of all queries.

    Attributes:
      name: name of the dataset.
      queries: the queries, without duplicates.
      passages: the positives, without duplicates.
      relevant: for each query the indices of the positives of all examples with that query, among
        the passages.
    """

    name: str
    queries: list[Text]
    passages: list[Text]
    relevant: list[set[int]]

    @classmethod
    def of(cls, dataset: PreparedDataset) -> "RetrievalTask":
        """Returns the task of a dataset."""
        examples = dataset.read(range(len(dataset)))
        queries, query_indices = _without_duplicates([example.query for example in examples])
        passages, passage_indices = _without_duplicates(
            [text for example in examples for text in example.positives]
        )
        relevant: list[set[int]] = [set() for _ in queries]
        passage_index = iter(passage_indices)
        for query_index, example in zip(query_indices, examples, strict=True):
            relevant[query_index] |= {next(passage_index) for _ in example.positives}
        return cls(dataset.name, queries, passages, relevant)

    def metrics(self, scores: Float[np.ndarray, "Q P"]) -> dict[str, float]:
        """Returns the metrics of the scores of all queries and passages, as DATASET/METRIC."""
        return self._named(retrieval_metrics(scores, self.relevant))

    def chance(self) -> dict[str, float]:
        """Returns the expected metrics of a random order, for one positive per query."""
        return self._named(chance_metrics(len(self.passages)))

    def _named(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {f"{self.name}/{metric}": value for metric, value in metrics.items()}


def _without_duplicates(texts: Sequence[Text]) -> tuple[list[Text], list[int]]:
    """Returns the different texts in order, and for each text its index among them."""
    fingerprints = np.array([text_fingerprint(text) for text in texts], np.uint64)
    kept, indices = np.unique(deduplicated_ids(fingerprints), return_inverse=True)
    return [texts[index] for index in kept], indices.tolist()


class RetrievalEvaluator:
    """nDCG@10 and recall@1 of retrieval, per dataset; see `Evaluator`."""

    def __init__(self, datasets: Sequence[PreparedDataset], batcher: TextBatcher):
        self._batcher = batcher
        self._datasets = datasets
        self._tasks = [RetrievalTask.of(dataset) for dataset in datasets]
        for dataset, task in zip(datasets, self._tasks, strict=True):
            batcher.check_rows(dataset, "query", task.queries)
            batcher.check_rows(dataset, "passage", task.passages)
        self._embed = batcher.jit(self._embed_batch)

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics."""
        return list(self.chance())

    def evaluate(self, parameters: nnx.State) -> dict[str, float]:
        """Returns "DATASET/ndcg_at_10" and "DATASET/recall_at_1"."""
        metrics = {}
        for task in self._tasks:
            queries = self._embed_all(parameters, task.queries, "query")
            passages = self._embed_all(parameters, task.passages, "passage")
            metrics |= task.metrics(queries @ passages.T)
        return metrics

    def trace(self, parameters: nnx.State) -> None:
        """Traces the programs of `evaluate`; the rows of all datasets have the same lengths."""
        task = self._tasks[0]
        for stream, texts in (("query", task.queries), ("passage", task.passages)):
            jax.eval_shape(self._embed, parameters, next(self._batcher.batches(texts, stream)))

    def chance(self) -> dict[str, float]:
        """Returns the expected metrics of a random order of the passages."""
        return _merged(task.chance() for task in self._tasks)

    def bm25_baseline(self) -> dict[str, float]:
        """Returns the metrics of BM25 on the same queries and passages."""
        tokenizer = load_saved_tokenizer(self._datasets[0])

        def words(texts: Sequence[Text]) -> list[str]:
            return [tokenizer.decode(text.tokens[text.mask].tolist()) for text in texts]

        return _merged(
            task.metrics(bm25_scores(words(task.queries), words(task.passages)))
            for task in self._tasks
        )

    def _embed_all(
        self, parameters: nnx.State, texts: Sequence[Text], stream: str
    ) -> Float[np.ndarray, "T D"]:
        batches = self._batcher.batches(texts, stream)
        embeddings = [np.asarray(self._embed(parameters, batch)) for batch in batches]
        return np.concatenate(embeddings)[: len(texts)]

    def _embed_batch(self, parameters: nnx.State, texts: PackedTexts) -> Float[Array, "T D"]:
        model = self._batcher.trainer.model(parameters)
        return embed_texts(model, texts, self._batcher.embedding)


class PerplexityEvaluator:
    """Perplexity of the answers of all chats; see `Evaluator`."""

    def __init__(self, datasets: Sequence[PreparedDataset], batcher: TextBatcher):
        self._batcher = batcher
        self._chats: list[Text] = []
        for dataset in datasets:
            chats = [example.chat for example in dataset.read(range(len(dataset)))]
            batcher.check_rows(dataset, "chat", chats)
            self._chats += chats
        self._cross_entropy = batcher.jit(self._cross_entropy_batch)

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics."""
        return ["perplexity"]

    def evaluate(self, parameters: nnx.State) -> dict[str, float]:
        """Returns "perplexity"."""
        batches = self._batcher.batches(self._chats, "chat")
        totals = [jax.device_get(self._cross_entropy(parameters, batch)) for batch in batches]
        nats, targets = np.sum(totals, axis=0)
        return {"perplexity": float(np.exp(nats / targets))}

    def trace(self, parameters: nnx.State) -> None:
        """Traces the program of `evaluate`."""
        batch = next(self._batcher.batches(self._chats, "chat"))
        jax.eval_shape(self._cross_entropy, parameters, batch)

    def chance(self) -> dict[str, float]:
        """Returns an empty dictionary."""
        return {}

    def bm25_baseline(self) -> dict[str, float]:
        """Returns an empty dictionary."""
        return {}

    def _cross_entropy_batch(
        self, parameters: nnx.State, chats: PackedTexts
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the sum of the cross-entropies of all targets, and the number of targets."""
        model = self._batcher.trainer.model(parameters)
        hidden = model(chats.tokens, chats.positions, chats.segment_ids, is_causal=True)
        targets, is_target = shift_targets(chats.tokens, chats.segment_ids, chats.mask)
        weights = is_target.astype(jnp.float32)
        softcap = model.config.final_logit_softcapping
        projection = model.output_projection()
        nats = next_token_loss(hidden, projection, targets, weights, softcap=softcap)
        return nats, jnp.sum(weights)


# The evaluator of each kind of text, by the names in `text.kinds.TEXT_KINDS`.
EVALUATORS: dict[str, type[Evaluator]] = {
    "embedding": RetrievalEvaluator,
    "generative": PerplexityEvaluator,
}


class HeldOut:
    """Held-out data, and the metrics of a model on it.

    Args:
      trainer: provides the model and the mesh.
      datasets: the datasets of each kind of text to evaluate.
      row_lengths: tokens per row of each stream ("query", "passage", "chat").
      batch_size: texts per batch.
      embedding: how texts are embedded.

    Raises:
      PreparedDataError: a text is longer than a row.
    """

    def __init__(
        self,
        trainer: Trainer,
        datasets: Mapping[str, Sequence[PreparedDataset]],
        row_lengths: Mapping[str, int],
        batch_size: int,
        embedding: EmbeddingSpec,
    ):
        self._trainer = trainer
        batcher = TextBatcher(trainer, embedding, row_lengths, batch_size)
        self._evaluators = [EVALUATORS[kind](own, batcher) for kind, own in datasets.items() if own]

    @property
    def metric_names(self) -> list[str]:
        """The names of the metrics."""
        return [name for evaluator in self._evaluators for name in evaluator.metric_names]

    def evaluate(self, parameters: nnx.State) -> dict[str, float]:
        """Returns "DATASET/ndcg_at_10", "DATASET/recall_at_1" and "perplexity"."""
        with jax.set_mesh(self._trainer.mesh):
            return _merged(evaluator.evaluate(parameters) for evaluator in self._evaluators)

    def trace(self) -> None:
        """Traces the programs of `evaluate`.

        Raises:
          AttentionError: the chosen attention implementation does not support the rows.
        """
        parameters = self._trainer.abstract_state().model_parameters
        for evaluator in self._evaluators:
            evaluator.trace(parameters)

    def bm25_baseline(self) -> dict[str, float]:
        """Returns the retrieval metrics of BM25 on the same queries and passages.

        Raises:
          ImportError: the package bm25s is not installed.
        """
        return _merged(evaluator.bm25_baseline() for evaluator in self._evaluators)

    def chance(self) -> dict[str, float]:
        """Returns the expected retrieval metrics of a random order, for one positive per query."""
        return _merged(evaluator.chance() for evaluator in self._evaluators)


def _merged(metrics: Iterator[dict[str, float]]) -> dict[str, float]:
    return {name: value for each in metrics for name, value in each.items()}
