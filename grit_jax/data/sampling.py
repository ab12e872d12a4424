"""Which examples and texts each batch holds: a pure function of (datasets, seed, step).

Legend of dimensions: N examples, T texts sampled per example, C streams.
"""

from collections import OrderedDict
from collections.abc import Mapping
import dataclasses
from fractions import Fraction
import threading
from typing import Any

from jaxtyping import Int
import numpy as np

from grit_jax.arithmetic import ceil_div
from grit_jax.data.kinds import BATCH_KINDS, SampledExamples
from grit_jax.data.length_balancing import balance_batches
from grit_jax.data.manifest import PreparedDataError, PreparedDataset
from grit_jax.data.mixing import (
    EpochShuffle,
    MixtureSchedule,
    RoundSchedule,
    SmallEpochShuffle,
    stable_seed,
)
from grit_jax.text.kinds import TEXT_KINDS

# Examples whose lengths are balanced together, and windows of them that a sampler caches.
WINDOW_EXAMPLES = 65_536
WINDOWS_CACHED = 2
# Batches that are sampled before training, to choose row shapes for their lengths.
PREVIEWED_WINDOWS = 4
BATCHES_PER_PREVIEWED_WINDOW = 8


class MixedSampler:
    """Batches of examples of one dataset or of several, each at its rate.

    A window of consecutive batches takes its examples from the datasets' shuffled orders. Within
    it, examples are assigned to batches such that all batches have about the same number of tokens
    (`balance_batches`).

    Args:
      datasets: the datasets with their rates, all of one kind of text.
      batch_size: examples per batch.
      group_size: passages per query (one positive, the others negatives); 0 for other kinds.
      seed: seed of the shuffles and of the sampled texts.
      schedule: the dataset of each example, if the datasets are small; by default datasets are
        evenly spread at their rates.

    Raises:
      PreparedDataError: a rate is not positive, or a dataset has fewer examples than its share of
        a batch.
    """

    def __init__(
        self,
        datasets: Mapping[PreparedDataset, int | float],
        batch_size: int,
        group_size: int,
        seed: int,
        schedule: MixtureSchedule | RoundSchedule | None = None,
    ):
        self.datasets = list(datasets)
        self.kind = self.datasets[0].manifest.kind
        self.batch_size, self.group_size, self._seed = batch_size, group_size, seed
        self.turns = make_mixture_schedule(datasets).counts.tolist()
        self.schedule = schedule or make_mixture_schedule(datasets)
        make_order = SmallEpochShuffle if schedule else EpochShuffle
        self._orders = [
            make_order(len(dataset), f"{seed}/order/{dataset.name}") for dataset in self.datasets
        ]
        window = min(WINDOW_EXAMPLES, sum(map(len, self.datasets)))
        self.window_batches = max(1, window // batch_size)
        self._windows: OrderedDict[int, SampledExamples] = OrderedDict()
        self._lock = threading.Lock()
        self._check_sizes()

    def _check_sizes(self) -> None:
        for dataset, count in zip(self.datasets, self.schedule.counts, strict=True):
            in_a_batch = min(self.batch_size, ceil_div(self.batch_size * count, len(self.schedule)))
            if len(dataset) < in_a_batch:
                share = "a batch" if in_a_batch == self.batch_size else "its share of a batch,"
                raise PreparedDataError(
                    f"{dataset.folder} has {len(dataset)} examples, fewer than {share} of "
                    f"{in_a_batch}: add examples, or lower config.data.{self.kind}_batch_size"
                )

    @property
    def texts_per_example(self) -> int:
        """Number of texts sampled per example (T)."""
        return BATCH_KINDS[self.kind].texts_per_example(self.group_size)

    def describe_sharing(self) -> str | None:
        """Returns None: batches of several datasets are what the configuration asks for."""
        return None

    def __getitem__(self, batch: int) -> SampledExamples:
        """Returns the sampled examples of the batch with this index."""
        index, offset = divmod(batch, self.window_batches)
        with self._lock:  # Threads that prepare neighboring steps need the same window.
            window = self._windows.get(index)
            if window is None:
                window = self._windows[index] = self._make_window(index)
            self._windows.move_to_end(index)
            if len(self._windows) > WINDOWS_CACHED:
                self._windows.popitem(last=False)
        return window[offset * self.batch_size : (offset + 1) * self.batch_size]

    def previews(
        self, windows: int = PREVIEWED_WINDOWS
    ) -> list[tuple[float, list[SampledExamples]]]:
        """Returns one pair: 1.0, the share of all batches, and the samples of some batches.

        Args:
          windows: number of windows to sample batches from.
        """
        # In the middle of equal parts: the rare batches with two epochs are at a window's ends.
        parts = np.arange(BATCHES_PER_PREVIEWED_WINDOW) + 0.5
        offsets = (self.window_batches * parts / BATCHES_PER_PREVIEWED_WINDOW).astype(int)
        starts = self.window_batches * np.arange(windows)
        batches = (starts[:, None] + np.unique(offsets)).ravel()
        return [(1.0, [self[batch] for batch in batches.tolist()])]

    def _make_window(self, index: int) -> SampledExamples:
        """Returns the sampled examples of all batches of a window, batch after batch."""
        count = self.window_batches * self.batch_size
        datasets, positions = self.schedule[np.arange(index * count, (index + 1) * count)]
        sampled = self._sample(datasets, positions)
        batches = np.repeat(np.arange(self.window_batches), self.batch_size)
        if self.window_batches > 1:
            # Epochs are separate groups, so that only a batch between two epochs mixes them.
            first_epoch = sampled.epochs.min()
            groups = sampled.datasets + len(self.datasets) * (sampled.epochs - first_epoch)
            batches = balance_batches(batches, groups, self._lengths_by_stream(sampled))
        return sampled[np.argsort(batches, kind="stable")]

    def _sample(
        self, datasets: Int[np.ndarray, " N"], positions: Int[np.ndarray, " N"]
    ) -> SampledExamples:
        """Returns the examples at these positions of their datasets' orders."""
        kind = BATCH_KINDS[self.kind]
        count, num_texts = len(datasets), self.texts_per_example
        examples, epochs = np.empty(count, np.int64), np.empty(count, np.int64)
        texts = np.empty((count, num_texts), np.int64)
        lengths = np.empty((count, num_texts), np.int32)
        for index, dataset in enumerate(self.datasets):
            own = np.flatnonzero(datasets == index)
            if not len(own):
                continue
            examples[own], epochs[own] = self._orders[index][positions[own]]
            seed = stable_seed(self._seed, "passages", dataset.name)
            texts[own] = kind.sample_texts(
                dataset.lengths, examples[own], epochs[own], self.group_size, seed
            )
            lengths[own] = np.where(texts[own] < 0, 0, dataset.lengths.tokens[texts[own]])
        return SampledExamples(datasets, examples, epochs, texts, lengths)

    def _lengths_by_stream(self, sampled: SampledExamples) -> Int[np.ndarray, "N C"]:
        """Returns the tokens of each example in each stream."""
        streams = TEXT_KINDS[self.kind].streams.values()
        return np.stack([sampled.lengths[:, texts].sum(axis=1) for texts in streams], axis=1)


class SingleDatasetSampler:
    """Batches of one dataset each; batches are assigned to datasets at their rates.

    Datasets with fewer examples than a batch share batches: each batch has all examples of one
    after another, in an order that changes (`RoundSchedule`). If they have too few for a batch
    together, the smallest others join them.

    Arguments and errors are those of `MixedSampler`.

    Attributes:
      datasets: the datasets.
      sharing: indices of the datasets that share batches, in order.
      turns: the rates of the datasets as integers.
    """

    def __init__(
        self,
        datasets: Mapping[PreparedDataset, int | float],
        batch_size: int,
        group_size: int,
        seed: int,
    ):
        self.datasets = list(datasets)
        self.kind = self.datasets[0].manifest.kind
        self.batch_size, self.group_size = batch_size, group_size
        self.turns = make_mixture_schedule(datasets).counts.tolist()
        self.sharing = self._find_sharing()
        # The datasets of each sampler: one, or those that share batches.
        alone = [index for index in range(len(self.datasets)) if index not in set(self.sharing)]
        self._members = [[index] for index in alone] + ([self.sharing] if self.sharing else [])
        rates = list(datasets.values())
        self.schedule = MixtureSchedule(
            [float(sum(Fraction(str(rates[index])) for index in each)) for each in self._members]
        )
        self.samplers = [
            MixedSampler({self.datasets[index]: 1.0}, batch_size, group_size, seed)
            for index in alone
        ]
        if self.sharing:
            shared = {self.datasets[index]: rates[index] for index in self.sharing}
            sizes = [len(dataset) for dataset in shared]
            schedule = RoundSchedule(list(shared.values()), sizes, f"{seed}/rounds")
            self.samplers.append(MixedSampler(shared, batch_size, group_size, seed, schedule))

    def _find_sharing(self) -> list[int]:
        sizes = [len(dataset) for dataset in self.datasets]
        if len(sizes) == 1 or min(sizes) >= self.batch_size:
            return []
        smallest_first = sorted(range(len(sizes)), key=lambda index: (sizes[index], index))
        total, sharing = 0, []
        for index in smallest_first:
            if sizes[index] >= self.batch_size and total >= self.batch_size:
                break
            sharing.append(index)
            total += sizes[index]
        return sorted(sharing)

    @property
    def texts_per_example(self) -> int:
        """Number of texts sampled per example (T)."""
        return self.samplers[0].texts_per_example

    def __getitem__(self, batch: int) -> SampledExamples:
        """Returns the sampled examples of the batch with this index."""
        (index,), (own_batch,) = self.schedule[np.array([batch])]
        sampled = self.samplers[index][int(own_batch)]
        members = np.array(self._members[index])
        return dataclasses.replace(sampled, datasets=members[sampled.datasets])

    def previews(self) -> list[tuple[float, list[SampledExamples]]]:
        """Returns for each sampler its share of all batches, and the samples of some batches."""
        windows = ceil_div(PREVIEWED_WINDOWS, len(self.samplers))
        shares = self.schedule.counts / len(self.schedule)
        return [
            (float(share), sampled)
            for share, sampler in zip(shares, self.samplers, strict=True)
            for _, sampled in sampler.previews(windows)
        ]

    def describe_sharing(self) -> str | None:
        """Returns a line about the datasets that share batches, None if there are none."""
        if not self.sharing:
            return None
        examples = sum(len(self.datasets[index]) for index in self.sharing)
        share = self.schedule.counts[-1] / len(self.schedule)
        return (
            f"{len(self.sharing):,} of {len(self.datasets):,} {self.kind} datasets are too small "
            f"for batches of their own ({self.batch_size:,}): their {examples:,} examples share "
            f"{share:.1%} of the batches"
        )


Sampler = MixedSampler | SingleDatasetSampler


def make_mixture_schedule(datasets: Mapping[PreparedDataset, int | float]) -> MixtureSchedule:
    """Returns the schedule of datasets with their rates.

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


def describe_sampler(sampler: Sampler) -> dict[str, Any]:
    """Returns everything that the batches of a sampler depend on, except the seed.

    Checkpoints store the result, and a run resumes only if it is unchanged. So its keys and values
    must not change between versions.
    """
    return {
        "batches": "mixed" if isinstance(sampler, MixedSampler) else "homogeneous",
        "batch_size": sampler.batch_size,
        "group_size": sampler.group_size,
        "datasets": {
            dataset.name: {"turns": count, "contents": dataset.lengths.dataset_fingerprint}
            for dataset, count in zip(sampler.datasets, sampler.turns, strict=True)
        },
    }
