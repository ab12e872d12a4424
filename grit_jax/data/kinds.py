"""How examples of each kind of text are sampled and assembled into a batch, one record per kind.

To add a kind, write its part of a `Batch` in `batch`, and its record here.

Legend of dimensions: N examples, T texts sampled per example, P texts of a stream.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

from jaxtyping import Int, Integer, UInt64
import numpy as np

from grit_jax.data.batch import ChatBatch, EmbeddingBatch, PackedTexts
from grit_jax.data.manifest import Lengths, PreparedDataset


@dataclasses.dataclass(frozen=True)
class SampledExamples:
    """Sampled examples, and the texts sampled from each.

    Attributes:
      datasets: index of each example's dataset in the sampler.
      examples: index of each example in its dataset.
      epochs: index of the dataset's epoch that each example is drawn in, from 0.
      texts: index of each text among all texts of the dataset; -1 where an example has fewer.
      lengths: tokens of each text; 0 where there is none.
    """

    datasets: Int[np.ndarray, " N"]
    examples: Int[np.ndarray, " N"]
    epochs: Int[np.ndarray, " N"]
    texts: Int[np.ndarray, "N T"]
    lengths: Int[np.ndarray, "N T"]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, chosen: Any) -> "SampledExamples":
        """Returns some of the examples, by slice, mask or indices."""
        return SampledExamples(
            *(getattr(self, field.name)[chosen] for field in dataclasses.fields(self))
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchKind:
    """How examples of one kind of text become a part of a batch.

    Attributes:
      texts_per_example: returns T, given the group size (passages per query).
      sample_texts: chooses the texts of each example; the arguments are those of `sample_passages`.
      make_part: makes the part of a batch; the arguments are those of `make_embedding_batch`.
      predicts_tokens: whether the model predicts tokens of these texts, which are then always
        causal, and not their embeddings.
    """

    texts_per_example: Callable[[int], int]
    sample_texts: Callable[..., Int[np.ndarray, "N T"]]
    make_part: Callable[..., Any]
    predicts_tokens: bool


def sample_passages(
    lengths: Lengths,
    examples: Int[np.ndarray, " N"],
    epochs: Int[np.ndarray, " N"],
    group_size: int,
    seed: int,
) -> Int[np.ndarray, "N T"]:
    """Samples a positive and negatives of each query, without replacement.

    The sample depends on the seed, the epoch and the example only.

    Args:
      lengths: lengths of the dataset.
      examples: indices of examples in the dataset.
      epochs: epoch of each example.
      group_size: passages per query: one positive, the others negatives.
      seed: seed of the sample.

    Returns:
      Indices among the dataset's texts: the query, its positive, its negatives, and -1 for an
      example with fewer than `group_size - 1` negatives.
    """
    first = lengths.first[examples]
    texts = np.full((len(examples), 1 + group_size), -1, np.int64)
    texts[:, 0] = first
    num_positives = lengths.num_positives[examples]
    keys = hash_integers(np.full(len(examples), seed), examples, epochs)
    texts[:, 1] = first + 1 + (keys % num_positives.astype(np.uint64)).astype(np.int64)
    first_negatives = first + 1 + num_positives
    num_negatives = lengths.first[examples + 1] - first_negatives
    owners, ranks = _ragged_indices(num_negatives)
    # The first negatives in the order of their hashes are a sample without replacement.
    order = np.lexsort((hash_integers(keys[owners], ranks), owners))
    is_chosen = ranks < group_size - 1
    negatives = first_negatives[owners] + ranks[order]
    texts[owners[is_chosen], 2 + ranks[is_chosen]] = negatives[is_chosen]
    return texts


def _ragged_indices(
    counts: Int[np.ndarray, " N"],
) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " M"]]:
    """Returns n and the index from 0 of each of the `counts[n]` items of every n, in order."""
    owners = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return owners, np.arange(len(owners)) - starts[owners]


def hash_integers(*arrays: Integer[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """Returns a 64-bit hash for each index, of the values of all arrays at that index.

    It is the finalizer of SplitMix64 (Steele et al., "Fast splittable pseudorandom number
    generators", 2014), applied once per array.
    """
    state = np.zeros(arrays[0].shape, np.uint64)
    for array in arrays:
        state = state + array.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def first_texts(
    lengths: Lengths,
    examples: Int[np.ndarray, " N"],
    epochs: Int[np.ndarray, " N"],
    group_size: int,
    seed: int,
) -> Int[np.ndarray, "N 1"]:
    """Returns the only text of each example; the arguments are those of `sample_passages`."""
    return lengths.first[examples][:, None]


def make_embedding_batch(
    packed: Mapping[str, PackedTexts],
    sampled: SampledExamples,
    datasets: Sequence[PreparedDataset],
    group_size: int,
    duplicate_positives_are_negatives: bool,
    same_query_positives_are_negatives: bool,
) -> EmbeddingBatch:
    """Returns the queries and passages of a batch.

    Args:
      packed: the rows of each stream.
      sampled: the examples of the whole batch.
      datasets: the sampler's datasets.
      group_size: passages per query.
      duplicate_positives_are_negatives: whether copies of a query's positive count as negatives.
      same_query_positives_are_negatives: whether the positives of other examples with the same
        query count as negatives.
    """
    fingerprints = np.zeros(sampled.texts.shape, np.uint64)
    for index, dataset in enumerate(datasets):
        own = sampled.datasets == index
        fingerprints[own] = dataset.lengths.fingerprints[sampled.texts[own]]
    is_used = sampled.texts[:, 1:].ravel() >= 0
    if duplicate_positives_are_negatives:
        passage_ids = np.where(is_used, np.arange(len(is_used)), -1).astype(np.int32)
    else:
        passage_ids = deduplicated_ids(fingerprints[:, 1:].ravel(), is_used)
    return EmbeddingBatch(
        packed["query"],
        packed["passage"],
        np.arange(0, len(is_used), group_size).astype(np.int32),
        passage_ids,
        None if same_query_positives_are_negatives else deduplicated_ids(fingerprints[:, 0]),
    )


def deduplicated_ids(
    fingerprints: UInt64[np.ndarray, " P"], used: Sequence[bool] | np.ndarray | None = None
) -> Int[np.ndarray, " P"]:
    """Returns for each text the index of its first copy, and -1 where `used` is False."""
    indices = np.arange(len(fingerprints)) if used is None else np.flatnonzero(used)
    _, first, inverse = np.unique(fingerprints[indices], return_index=True, return_inverse=True)
    ids = np.full(len(fingerprints), -1, np.int32)
    ids[indices] = indices[first[inverse]]
    return ids


def make_chat_batch(
    packed: Mapping[str, PackedTexts],
    sampled: SampledExamples,
    datasets: Sequence[PreparedDataset],
    group_size: int,
    duplicate_positives_are_negatives: bool,
    same_query_positives_are_negatives: bool,
) -> ChatBatch:
    """Returns the chats of a batch; the arguments are those of `make_embedding_batch`."""
    return ChatBatch(packed["chat"])


# By the names in `text.kinds.TEXT_KINDS`.
BATCH_KINDS = {
    "embedding": BatchKind(
        texts_per_example=lambda group_size: 1 + group_size,
        sample_texts=sample_passages,
        make_part=make_embedding_batch,
        predicts_tokens=False,
    ),
    "generative": BatchKind(
        texts_per_example=lambda group_size: 1,
        sample_texts=first_texts,
        make_part=make_chat_batch,
        predicts_tokens=True,
    ),
}
