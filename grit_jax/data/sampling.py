"""Which texts a step reads: a pure function of (datasets, seed, step).

Legend of dimensions: N examples, T texts of an example (a query and its passages, or a chat).
"""

from collections import OrderedDict
from collections.abc import Mapping
import dataclasses
import threading
from typing import Any

from jaxtyping import Int, UInt64
import numpy as np

from grit_jax.arithmetic import ceil_div
from grit_jax.data.length_balancing import balance_batches
from grit_jax.data.manifest import Lengths, PreparedDataError, PreparedDataset
from grit_jax.data.mixing import EpochShuffle, MixtureSchedule, stable_seed

# Examples among which lengths are evened out, and windows of them that a stream remembers.
WINDOW_EXAMPLES = 65_536
WINDOWS_KEPT = 2
# Batches that are looked at to see how long batches are.
PREVIEWED_WINDOWS = 4
BATCHES_A_PREVIEW = 8


@dataclasses.dataclass(frozen=True)
class SampledExamples:
    """Examples drawn, and the texts of each that are read.

    Attributes:
      datasets: numbers of the examples' datasets in their stream.
      examples: numbers of the examples in their datasets.
      epochs: how often the dataset has been gone through before.
      texts: numbers of the texts among all texts of the dataset; -1 where an example has fewer.
      lengths: tokens of the texts, 0 where there is none.
    """

    datasets: Int[np.ndarray, " N"]
    examples: Int[np.ndarray, " N"]
    epochs: Int[np.ndarray, " N"]
    texts: Int[np.ndarray, "N T"]
    lengths: Int[np.ndarray, "N T"]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, chosen: Any) -> "SampledExamples":
        """Returns some of the examples."""
        return SampledExamples(
            *(getattr(self, field.name)[chosen] for field in dataclasses.fields(self))
        )


class MixedSampler:
    """Batches of examples of one dataset or of several, each at its rate.

    Neighbours in the datasets' orders share a window of some batches. Within it, examples are
    dealt to the batches so that these have about the same number of tokens (`balance_batches`).

    Args:
      datasets: the datasets with their rates.
      batch_size: examples a batch.
      group_size: passages a query (a positive, the rest negatives); 0 for chats.
      seed: of every permutation and draw.

    Raises:
      PreparedDataError: a rate is not positive, or a dataset has fewer examples than its share of
        a batch.
    """

    def __init__(
        self,
        datasets: Mapping[PreparedDataset, float],
        batch_size: int,
        group_size: int,
        seed: int,
    ):
        self.datasets = list(datasets)
        self.batch_size, self.group_size, self._seed = batch_size, group_size, seed
        self._turns = make_mixture_schedule(datasets)
        self._orders = [
            EpochShuffle(len(dataset), f"{seed}/order/{dataset.name}") for dataset in self.datasets
        ]
        window = min(WINDOW_EXAMPLES, sum(map(len, self.datasets)))
        self.window_batches = max(1, window // batch_size)
        self._windows: OrderedDict[int, SampledExamples] = OrderedDict()
        self._lock = threading.Lock()
        self._check_sizes()

    def _check_sizes(self) -> None:
        for dataset, count in zip(self.datasets, self._turns.counts, strict=True):
            in_a_batch = min(self.batch_size, ceil_div(self.batch_size * count, len(self._turns)))
            if len(dataset) < in_a_batch:
                share = "a batch" if in_a_batch == self.batch_size else "its share of a batch,"
                raise PreparedDataError(
                    f"{dataset.folder} has {len(dataset)} examples, fewer than {share} of "
                    f"{in_a_batch}: add examples or lower the batch size"
                )

    def __getitem__(self, batch: int) -> SampledExamples:
        """Returns what batch number `batch` draws."""
        number, place = divmod(batch, self.window_batches)
        with self._lock:  # Threads that read neighbours want the same window.
            window = self._windows.get(number)
            if window is None:
                window = self._windows[number] = self._make_window(number)
            self._windows.move_to_end(number)
            if len(self._windows) > WINDOWS_KEPT:
                self._windows.popitem(last=False)
        return window[place * self.batch_size : (place + 1) * self.batch_size]

    def previews(
        self, windows: int = PREVIEWED_WINDOWS
    ) -> list[tuple[float, list[SampledExamples]]]:
        """Returns the kinds of batch there are, here one: its share, and some such batches."""
        # In the middle of equal parts: at a window's ends are the rare batches of two epochs.
        parts = np.arange(BATCHES_A_PREVIEW) + 0.5
        places = np.unique((self.window_batches * parts / BATCHES_A_PREVIEW).astype(int))
        starts = self.window_batches * np.arange(windows)
        return [(1.0, [self[int(start + place)] for start in starts for place in places])]

    def _make_window(self, number: int) -> SampledExamples:
        """Returns the draws of all batches of a window, batch after batch."""
        count = self.window_batches * self.batch_size
        datasets, turns = self._turns[np.arange(number * count, (number + 1) * count)]
        drawn = self._draw(datasets, turns)
        batches = np.repeat(np.arange(self.window_batches), self.batch_size)
        if self.window_batches > 1:
            # An epoch keeps to its own places: so only a batch between two may have an example of
            # both, and not any batch of the window.
            first_epoch = drawn.epochs.min()
            groups = drawn.datasets + len(self.datasets) * (drawn.epochs - first_epoch)
            batches = balance_batches(batches, groups, _lengths_by_stream(drawn.lengths))
        return drawn[np.argsort(batches, kind="stable")]

    def _draw(
        self, datasets: Int[np.ndarray, " N"], turns: Int[np.ndarray, " N"]
    ) -> SampledExamples:
        count, num_texts = len(datasets), 1 + self.group_size
        examples, epochs = np.empty(count, np.int64), np.empty(count, np.int64)
        texts = np.empty((count, num_texts), np.int64)
        lengths = np.empty((count, num_texts), np.int32)
        for number, dataset in enumerate(self.datasets):
            own = np.flatnonzero(datasets == number)
            if not len(own):
                continue
            examples[own], epochs[own] = self._orders[number][turns[own]]
            key = stable_seed(self._seed, "passages", dataset.name)
            texts[own] = sample_passages(
                dataset.lengths, examples[own], epochs[own], self.group_size, key
            )
            lengths[own] = np.where(texts[own] < 0, 0, dataset.lengths.tokens[texts[own]])
        return SampledExamples(datasets, examples, epochs, texts, lengths)


class SingleDatasetSampler:
    """Batches of one dataset each; datasets take turns at their rates.

    The arguments and the errors are those of `MixedSampler`.
    """

    def __init__(
        self,
        datasets: Mapping[PreparedDataset, float],
        batch_size: int,
        group_size: int,
        seed: int,
    ):
        self.datasets = list(datasets)
        self.batch_size, self.group_size = batch_size, group_size
        self._turns = make_mixture_schedule(datasets)
        self._streams = [
            MixedSampler({dataset: 1.0}, batch_size, group_size, seed) for dataset in self.datasets
        ]

    def __getitem__(self, batch: int) -> SampledExamples:
        """Returns what batch number `batch` draws."""
        (number,), (turn,) = self._turns[np.array([batch])]
        drawn = self._streams[number][int(turn)]
        return dataclasses.replace(drawn, datasets=np.full(len(drawn), number))

    def previews(self) -> list[tuple[float, list[SampledExamples]]]:
        """Returns the kinds of batch there are, one a dataset: its share, and some such batches."""
        windows = ceil_div(PREVIEWED_WINDOWS, len(self.datasets))
        shares = self._turns.counts / len(self._turns)
        return [
            (float(share), drawn)
            for share, stream in zip(shares, self._streams, strict=True)
            for _, drawn in stream.previews(windows)
        ]


Stream = MixedSampler | SingleDatasetSampler


def make_mixture_schedule(datasets: Mapping[PreparedDataset, float]) -> MixtureSchedule:
    """Returns the turns that datasets take.

    Raises:
      PreparedDataError: a rate is not positive; the message names the dataset.
    """
    for dataset, rate in datasets.items():
        if not rate > 0:
            raise PreparedDataError(
                f"the mixture has {dataset.name} at a rate of {rate}: rates must be positive; "
                "leave the dataset out or change its rate, and prepare the mixture again"
            )
    return MixtureSchedule(list(datasets.values()))


def _lengths_by_stream(lengths: Int[np.ndarray, "N T"]) -> Int[np.ndarray, "N K"]:
    """Returns the tokens of an example in queries and in passages, or in chats."""
    if lengths.shape[1] == 1:
        return lengths
    return np.stack([lengths[:, 0], lengths[:, 1:].sum(axis=1)], axis=1)


def sample_passages(
    lengths: Lengths,
    examples: Int[np.ndarray, " N"],
    epochs: Int[np.ndarray, " N"],
    group_size: int,
    seed: int,
) -> Int[np.ndarray, "N T"]:
    """Returns the texts to read of each example: its query, a positive and negatives, or its chat.

    Positive and negatives are drawn without repetition, by seed, epoch and example.

    Args:
      lengths: of the dataset.
      examples: numbers of examples.
      epochs: of each.
      group_size: passages a query; 0 for chats.
      seed: of the draws.

    Returns:
      Numbers among the dataset's texts: query, positive, then negatives, and -1 where there are
      fewer of these than `group_size - 1`.
    """
    first = lengths.first[examples]
    texts = np.full((len(examples), 1 + group_size), -1, np.int64)
    texts[:, 0] = first
    if not group_size:
        return texts
    num_positives = lengths.num_positives[examples]
    keys = hash_of(np.full(len(examples), seed), examples, epochs)
    texts[:, 1] = first + 1 + (keys % num_positives.astype(np.uint64)).astype(np.int64)
    first_negatives = first + 1 + num_positives
    num_negatives = lengths.first[examples + 1] - first_negatives
    owners, places = _ragged(num_negatives)
    # Negatives in the order of their hashes: the first are a draw without repetition.
    order = np.lexsort((hash_of(keys[owners], places), owners))
    ranks = places  # The r-th of an example's negatives in this order has rank r, as before.
    chosen = ranks < group_size - 1
    texts[owners[chosen], 2 + ranks[chosen]] = (first_negatives[owners] + places[order])[chosen]
    return texts


def _ragged(counts: Int[np.ndarray, " N"]) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each of `counts[n]` things, n after n, its n and its number from 0."""
    owners = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return owners, np.arange(len(owners)) - starts[owners]


def hash_of(*parts: Int[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """Returns 64 bits for each place of the arrays, which depend on all of them.

    It is the finalizer of SplitMix64 (Steele et al., "Fast splittable pseudorandom number
    generators", 2014), applied once for each array.
    """
    state = np.zeros(parts[0].shape, np.uint64)
    for part in parts:
        state = state + part.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def describe(stream: Stream) -> dict[str, Any]:
    """Returns what the batches of a stream depend on, but for the seed."""
    counts = stream._turns.counts.tolist()
    return {
        "batches": "mixed" if isinstance(stream, MixedSampler) else "homogeneous",
        "batch_size": stream.batch_size,
        "group_size": stream.group_size,
        "datasets": {
            dataset.name: {"turns": turns, "contents": dataset.lengths.fingerprint}
            for dataset, turns in zip(stream.datasets, counts, strict=True)
        },
    }
