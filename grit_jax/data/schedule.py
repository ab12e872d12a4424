"""Which examples a step reads: a pure function of (datasets, seed, step).

Datasets take turns in a fixed pattern that keeps to their rates, a whole batch from one dataset at
a time: passages of the same dataset make harder negatives (GRIT, section 3.3). Each dataset goes
through a new permutation of its examples every epoch. Nothing has a state, so a run continues at
any step without replaying those before it.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
from typing import Any

import grain
import numpy as np

from grit_jax.data.manifest import PreparedDataError, PreparedDataset


@dataclasses.dataclass(frozen=True)
class Draw:
    """One example of a step: its number in the dataset, and its epoch for the draws within it."""

    example: int
    epoch: int


class Schedule:
    """The order in which batches of several datasets come.

    Args:
      datasets: the datasets with their rates.
      batch_size: examples a step.
      seed: of every permutation.

    Raises:
      PreparedDataError: a dataset has too few examples for one batch without repetition.
    """

    def __init__(self, datasets: Mapping[PreparedDataset, float], batch_size: int, seed: int):
        self.datasets = list(datasets)
        self.batch_size = batch_size
        for dataset in self.datasets:
            if len(dataset) < batch_size:
                raise PreparedDataError(
                    f"{dataset.folder} has {len(dataset)} examples, fewer than a batch of "
                    f"{batch_size}: add examples or lower the batch size"
                )
        self._turns: Any = grain.MapDataset.mix(
            [
                # Turn k of dataset number d.
                grain.MapDataset.range(2**40).map(lambda turn, number=number: (number, turn))
                for number in range(len(self.datasets))
            ],
            list(datasets.values()),
        )
        self._orders: list[Any] = [
            grain.MapDataset.range(len(dataset))
            .seed(stable_seed(seed, "order", dataset.name))
            .shuffle()
            .repeat(None)
            for dataset in self.datasets
        ]

    def __getitem__(self, step: int) -> tuple[PreparedDataset, list[Draw]]:
        """Returns the dataset of step `step`, and the examples that it draws."""
        number, turn = self._turns[step]
        dataset, order = self.datasets[number], self._orders[number]
        places = range(turn * self.batch_size, (turn + 1) * self.batch_size)
        return dataset, [Draw(order[place], place // len(dataset)) for place in places]


def stable_seed(*parts: int | str) -> int:
    """Returns a 32-bit seed that depends on all of `parts`, alike on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def choose_passages(
    num_positives: int, num_negatives: int, group_size: int, seed: int, draw: Draw
) -> list[int]:
    """Returns a positive and up to `group_size - 1` negatives of an example, drawn by its epoch.

    Args:
      num_positives: number of positives.
      num_negatives: number of negatives; may be none.
      group_size: passages a query.
      seed: of the draw.
      draw: the example and its epoch.

    Returns:
      Numbers of the passages, positives first, as an example lists them; the positive comes first.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, draw.example * 2**20 + draw.epoch]))
    positive = int(generator.integers(num_positives))
    wanted = min(group_size - 1, num_negatives)
    negatives = generator.choice(num_negatives, wanted, replace=False) if wanted else []
    return [positive, *(num_positives + int(negative) for negative in negatives)]
