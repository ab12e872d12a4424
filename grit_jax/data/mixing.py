"""Whose turn it is, and in which order a dataset's examples come: pure functions of a number.

Datasets take turns in a fixed block that holds each as often as its rate says. A dataset goes
through a new permutation of its examples every epoch. Nothing has a state, so a run continues at
any step without replaying those before it.
"""

from collections.abc import Sequence
from fractions import Fraction
import functools
import hashlib
import math

from grain.experimental import index_shuffle
from jaxtyping import Int
import numpy as np

# Turns of a block at most: rates that need longer blocks are kept to a millionth.
LONGEST_BLOCK = 2**20
# An index is permuted in 32 bits.
MOST_EXAMPLES = 2**32 - 1


class MixtureSchedule:
    """The order in which several datasets take turns, each at its rate.

    Every block of `len(self)` turns holds each dataset exactly as often as its rate says, spread
    evenly. A dataset without its share of a block of a million turns has one turn in it.

    Args:
      rates: of the datasets; only their proportions count.

    Raises:
      ValueError: a rate is not a positive number.
    """

    def __init__(self, rates: Sequence[float]):
        self.counts = np.array(block_counts(rates), np.int64)
        numbers = np.repeat(np.arange(len(rates)), self.counts)
        ranks = np.concatenate([np.arange(count) for count in self.counts])
        # Turn r of c lies in the middle of the r-th of c equal parts of the block.
        order = np.argsort((2 * ranks + 1) / (2 * self.counts[numbers]), kind="stable")
        self._numbers, self._ranks = numbers[order], ranks[order]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, turns: Int[np.ndarray, " N"]) -> tuple[np.ndarray, np.ndarray]:
        """Returns whose turns these are, and how many that dataset has had before each."""
        blocks, places = np.divmod(turns, len(self))
        numbers = self._numbers[places]
        return numbers, blocks * self.counts[numbers] + self._ranks[places]


def block_counts(rates: Sequence[float]) -> list[int]:
    """Returns how many turns each rate has in the shortest block that keeps to all of them.

    Raises:
      ValueError: a rate is not a positive number.
    """
    for rate in rates:
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"a rate must be a positive number, not {rate}")
    # A decimal fraction is meant as it is written: 0.8 is 4/5, and not the nearest float.
    exact = [Fraction(str(float(rate))) for rate in rates]
    unit = Fraction(
        math.gcd(*(rate.numerator for rate in exact)),
        math.lcm(*(rate.denominator for rate in exact)),
    )
    # With all rates in lowest terms this is their greatest common divisor.
    counts = [int(rate / unit) for rate in exact]
    if sum(counts) <= LONGEST_BLOCK:
        return counts
    return [max(1, round(rate / sum(exact) * LONGEST_BLOCK)) for rate in exact]


class EpochShuffle:
    """The order of a dataset's examples: all of them once an epoch, permuted anew each time.

    A lookup takes no memory, however large the dataset is.

    Args:
      size: number of examples.
      seed: of the permutations; any text.

    Raises:
      ValueError: there are more examples than can be permuted.
    """

    def __init__(self, size: int, seed: str):
        if size > MOST_EXAMPLES:
            raise ValueError(f"{size} examples are more than {MOST_EXAMPLES}: split the dataset")
        self._size, self._seed = size, seed

    def __getitem__(self, places: Int[np.ndarray, " N"]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the examples at these places of the endless order, and their epochs."""
        epochs, places = np.divmod(places, self._size)
        seeds = {epoch: stable_seed(self._seed, epoch) for epoch in np.unique(epochs).tolist()}
        permute = functools.partial(index_shuffle, max_index=self._size - 1, rounds=4)
        pairs = zip(places.tolist(), epochs.tolist(), strict=True)
        examples = [permute(place, seed=seeds[epoch]) for place, epoch in pairs]
        return np.array(examples, np.int64), epochs


def stable_seed(*parts: int | str) -> int:
    """Returns a 32-bit seed that depends on all of `parts`, alike on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")
