"""Stateless dataset mixing and per-epoch shuffling, as functions of an index.

Training slots are assigned to datasets by a fixed block that holds each dataset in proportion to
its rate. Each dataset is shuffled again every epoch. Nothing has state, so a run resumes at any
step without replaying the steps before it.
"""

from collections.abc import Sequence
from fractions import Fraction
import functools
import hashlib
import math

from grain.experimental import index_shuffle
from jaxtyping import Int
import numpy as np

from grit_jax.data.kinds import hash_integers

# Maximum slots of a block. Rates that need a longer block are rounded to a millionth.
MAX_BLOCK_LENGTH = 2**20
# grain permutes 32-bit indices.
MAX_EXAMPLES = 2**32 - 1


class MixtureSchedule:
    """Assigns slots (one per example or per batch) to several datasets, each at its rate.

    Every block of `len(self)` slots holds each dataset exactly in proportion to its rate, evenly
    spread. A dataset whose share is below one slot of the longest block still gets one.

    Args:
      rates: rates of the datasets; only their proportions matter.

    Attributes:
      counts: the slots of each dataset in a block.

    Raises:
      ValueError: a rate is not a positive number.
    """

    def __init__(self, rates: Sequence[int | float]):
        self.counts = np.array(block_counts(rates), np.int64)
        datasets = np.repeat(np.arange(len(rates)), self.counts)
        ranks = np.concatenate([np.arange(count) for count in self.counts])
        # Slot r of c is in the middle of the r-th of c equal parts of the block.
        order = np.argsort((2 * ranks + 1) / (2 * self.counts[datasets]), kind="stable")
        self._datasets, self._ranks = datasets[order], ranks[order]

    def __len__(self) -> int:
        return len(self._datasets)

    def __getitem__(
        self, slots: Int[np.ndarray, " N"]
    ) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """Returns the dataset of each slot, and the number of earlier slots of that dataset."""
        blocks, offsets = np.divmod(slots, len(self))
        datasets = self._datasets[offsets]
        return datasets, blocks * self.counts[datasets] + self._ranks[offsets]


class RoundSchedule:
    """Assigns slots to several datasets, each at its rate, in long runs of the same dataset.

    In each round, every dataset has one run, and the order of the datasets is shuffled again. With
    rates by size, a round is an epoch of all datasets. No run is longer than its dataset, if the
    rates allow it.

    Args:
      rates: rates of the datasets; only their proportions matter.
      sizes: number of examples of each dataset.
      seed: any text.

    Attributes:
      counts: the slots of each dataset in a round.

    Raises:
      ValueError: a rate is not a positive number.
    """

    def __init__(self, rates: Sequence[int | float], sizes: Sequence[int], seed: str):
        counts = np.array(block_counts(rates), np.int64)
        self.counts = counts * max(1, int((np.array(sizes) // counts).min()))
        self._order = SmallEpochShuffle(len(rates), seed)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __getitem__(
        self, slots: Int[np.ndarray, " N"]
    ) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """Returns the dataset of each slot, and the number of earlier slots of that dataset."""
        rounds, offsets = np.divmod(slots, len(self))
        datasets, positions = np.empty_like(slots), np.empty_like(slots)
        for number in np.unique(rounds):
            order, _ = self._order[number * len(self.counts) + np.arange(len(self.counts))]
            ends = np.cumsum(self.counts[order])
            own = rounds == number
            run = np.searchsorted(ends, offsets[own], side="right")
            datasets[own] = order[run]
            ranks = offsets[own] - (ends - self.counts[order])[run]
            positions[own] = number * self.counts[order[run]] + ranks
        return datasets, positions


def block_counts(rates: Sequence[int | float]) -> list[int]:
    """Returns the number of slots of each rate in the shortest block that has exact proportions.

    Raises:
      ValueError: a rate is not a positive number.
    """
    for rate in rates:
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"a rate must be a positive number, not {rate}")
    # A decimal fraction is taken as written: 0.8 is 4/5, not the nearest float.
    exact = [Fraction(str(float(rate))) for rate in rates]
    # The greatest common divisor of fractions in lowest terms.
    unit = Fraction(
        math.gcd(*(rate.numerator for rate in exact)),
        math.lcm(*(rate.denominator for rate in exact)),
    )
    counts = [int(rate / unit) for rate in exact]
    if sum(counts) <= MAX_BLOCK_LENGTH:
        return counts
    return [max(1, round(rate / sum(exact) * MAX_BLOCK_LENGTH)) for rate in exact]


class EpochShuffle:
    """An endless order of a dataset's examples: a new permutation of all of them every epoch.

    A lookup takes constant memory, whatever the size of the dataset.

    Args:
      size: number of examples.
      seed: any text.

    Raises:
      ValueError: the dataset has more examples than can be permuted.
    """

    def __init__(self, size: int, seed: str):
        if size > MAX_EXAMPLES:
            raise ValueError(f"{size} examples are more than {MAX_EXAMPLES}: split the dataset")
        self._size, self._seed = size, seed

    def __getitem__(
        self, positions: Int[np.ndarray, " N"]
    ) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """Returns the examples at these positions of the endless order, and their epochs."""
        epochs, offsets = np.divmod(positions, self._size)
        seeds = {epoch: stable_seed(self._seed, epoch) for epoch in np.unique(epochs).tolist()}
        permute = functools.partial(index_shuffle, max_index=self._size - 1, rounds=4)
        pairs = zip(offsets.tolist(), epochs.tolist(), strict=True)
        examples = [permute(offset, seed=seeds[epoch]) for offset, epoch in pairs]
        return np.array(examples, np.int64), epochs


class SmallEpochShuffle(EpochShuffle):
    """The same for a small dataset, of which a lookup sorts all examples.

    `index_shuffle` takes as long for a few examples as for 2^16.
    """

    def __getitem__(
        self, positions: Int[np.ndarray, " N"]
    ) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """Returns the examples at these positions of the endless order, and their epochs."""
        epochs, offsets = np.divmod(positions, self._size)
        examples = np.empty_like(positions)
        indices = np.arange(self._size)
        for epoch in np.unique(epochs).tolist():
            seed = np.full(self._size, stable_seed(self._seed, epoch))
            own = epochs == epoch
            examples[own] = np.argsort(hash_integers(seed, indices), kind="stable")[offsets[own]]
        return examples, epochs


def stable_seed(*parts: int | str) -> int:
    """Returns a 32-bit seed that depends on all of `parts`, and is the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")
