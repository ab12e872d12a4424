"""Retrieval and perplexity on held-out data, with the model as it is being trained."""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from grit_jax.data.batch import PackedTexts
from grit_jax.data.batch_plan import check_row_length, deduplicated_ids
from grit_jax.data.manifest import PreparedDataset, fingerprint
from grit_jax.data.packing import pack, plan_rows
from grit_jax.data.saved_tokenizer import load_saved_tokenizer
from grit_jax.evaluation.retrieval import bm25_scores, chance_metrics, retrieval_metrics
from grit_jax.objectives.embedding import embed_texts
from grit_jax.objectives.next_token import next_token_loss, shift_targets
from grit_jax.sharding import batch_shards
from grit_jax.text.examples import Text
from grit_jax.training.train_step import Trainer


@dataclasses.dataclass(frozen=True)
class RetrievalTask:
    """The queries of a held-out dataset, and their corpus: the positives of them all.

    Attributes:
      name: name of the dataset.
      queries: the queries.
      passages: the positives, each text once.
      relevant: for each query the numbers of its positives among the passages.
    """

    name: str
    queries: list[Text]
    passages: list[Text]
    relevant: list[set[int]]

    @classmethod
    def of(cls, dataset: PreparedDataset) -> "RetrievalTask":
        """Returns the task that a dataset makes."""
        examples = dataset.read(range(len(dataset)))
        positives = [text for example in examples for text in example.positives]
        first_copies = deduplicated_ids(np.array([fingerprint(text) for text in positives]))
        kept = np.unique(first_copies)
        places = iter(np.searchsorted(kept, first_copies).tolist())
        relevant = [{next(places) for _ in example.positives} for example in examples]
        queries = [example.query for example in examples]
        return cls(dataset.name, queries, [positives[number] for number in kept], relevant)


class HeldOut:
    """Held-out data, and the measures of a model on it.

    Args:
      trainer: the model's and the mesh's.
      retrieval: the datasets of queries and positives; none to leave retrieval out.
      chats: the datasets of chats; none to leave perplexity out.
      row_lengths: tokens of a row, by stream ("query", "passage", "chat").
      batch_size: texts to a batch.

    Raises:
      PreparedDataError: a text is longer than a row.
    """

    def __init__(
        self,
        trainer: Trainer,
        retrieval: Sequence[PreparedDataset],
        chats: Sequence[PreparedDataset],
        row_lengths: dict[str, int],
        batch_size: int,
    ):
        self._trainer = trainer
        self._row_lengths, self._batch_size = row_lengths, batch_size
        self._retrieval = list(retrieval)
        self._tasks = [RetrievalTask.of(dataset) for dataset in retrieval]
        self._chats: list[Text] = []
        for dataset, task in zip(retrieval, self._tasks, strict=True):
            self._check_rows(dataset, "query", task.queries)
            self._check_rows(dataset, "passage", task.passages)
        for dataset in chats:
            texts = [example.chat for example in dataset.read(range(len(dataset)))]
            self._check_rows(dataset, "chat", texts)
            self._chats += texts
        # Every process reads all that comes out.
        whole = NamedSharding(trainer.mesh, PartitionSpec())
        self._embed = jax.jit(self._embed_batch, out_shardings=whole)
        self._cross_entropy = jax.jit(self._cross_entropy_batch, out_shardings=whole)

    @property
    def names(self) -> list[str]:
        """The names of what `measure` returns."""
        return [*self.chance(), *(["perplexity"] if self._chats else [])]

    def measure(self, parameters: nnx.State) -> dict[str, float]:
        """Returns "DATASET/ndcg_at_10", "DATASET/recall_at_1" and "perplexity"."""
        measures = {}
        with jax.set_mesh(self._trainer.mesh):
            for task in self._tasks:
                queries = self._embed_all(parameters, task.queries, "query")
                passages = self._embed_all(parameters, task.passages, "passage")
                measures |= _named(task, queries @ passages.T)
            if self._chats:
                measures["perplexity"] = self._perplexity(parameters)
        return measures

    def trace(self) -> None:
        """Traces the programs of `measure`, for rows of each stream.

        Raises:
          AttentionError: the implementation that was asked for does not serve them.
        """
        parameters = self._trainer.abstract_state().model_parameters
        for task in self._tasks[:1]:  # All have rows of the same lengths.
            for stream, texts in (("query", task.queries), ("passage", task.passages)):
                jax.eval_shape(self._embed, parameters, next(self._batches(texts, stream)))
        if self._chats:
            batch = next(self._batches(self._chats, "chat"))
            jax.eval_shape(self._cross_entropy, parameters, batch)

    def bm25_baseline(self) -> dict[str, float]:
        """Returns the retrieval measures of BM25 on the same queries and passages.

        Raises:
          ImportError: the package bm25s is not installed.
        """
        if not self._tasks:
            return {}
        tokenizer = load_saved_tokenizer(self._retrieval[0])

        def words(texts: Sequence[Text]) -> list[str]:
            return [tokenizer.decode(text.tokens[text.mask].tolist()) for text in texts]

        measures = {}
        for task in self._tasks:
            measures |= _named(task, bm25_scores(words(task.queries), words(task.passages)))
        return measures

    def chance(self) -> dict[str, float]:
        """Returns what a random order of the passages earns on average, for one answer a query."""
        measures = {}
        for task in self._tasks:
            found = chance_metrics(len(task.passages))
            measures |= {f"{task.name}/{measure}": value for measure, value in found.items()}
        return measures

    def _check_rows(self, dataset: PreparedDataset, stream: str, texts: list[Text]) -> None:
        check_row_length(dataset, stream, max(map(len, texts)), self._row_lengths)

    def _embed_all(self, parameters: nnx.State, texts: list[Text], stream: str) -> np.ndarray:
        batches = [np.asarray(self._embed(parameters, b)) for b in self._batches(texts, stream)]
        return np.concatenate(batches)[: len(texts)]

    def _perplexity(self, parameters: nnx.State) -> float:
        batches = self._batches(self._chats, "chat")
        totals = [jax.device_get(self._cross_entropy(parameters, batch)) for batch in batches]
        nats, targets = np.sum(totals, axis=0)
        return float(np.exp(nats / targets))

    def _batches(self, texts: list[Text], stream: str) -> Iterator[Any]:
        """Yields the texts in order, in batches of one shape; numbers may be unused at the end."""
        row_length, shards = self._row_lengths[stream], batch_shards(self._trainer.mesh)
        groups = [
            texts[start : start + self._batch_size]
            for start in range(0, len(texts), self._batch_size)
        ]
        plans = [plan_rows([len(text) for text in group], row_length) for group in groups]
        num_rows = -(-max(len(plan) for plan in plans) // shards) * shards
        for group, plan in zip(groups, plans, strict=True):
            numbered = dict(enumerate(group))
            packed = pack(numbered, plan, num_rows, row_length, num_texts=self._batch_size)
            yield self._trainer.to_devices(packed)

    def _embed_batch(self, parameters: nnx.State, texts: PackedTexts) -> jax.Array:
        return embed_texts(
            self._trainer.model(parameters), texts, self._trainer.loss_config.embedding
        )

    def _cross_entropy_batch(
        self, parameters: nnx.State, chats: PackedTexts
    ) -> tuple[jax.Array, jax.Array]:
        model = self._trainer.model(parameters)
        hidden = model(chats.tokens, chats.positions, chats.segment_ids, is_causal=True)
        targets, is_target = shift_targets(chats.tokens, chats.segment_ids, chats.mask)
        weights = is_target.astype(jnp.float32)
        nats = next_token_loss(hidden, model.output_projection(), targets, weights)
        return nats, jnp.sum(weights)


def _named(task: RetrievalTask, scores: np.ndarray) -> dict[str, float]:
    measures = retrieval_metrics(scores, task.relevant)
    return {f"{task.name}/{measure}": value for measure, value in measures.items()}
