"""Sizes of the experiment, and the runs that it consists of."""

from collections.abc import Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Preset:
    """How large the experiment is.

    Attributes:
      title: for tables.
      layers: numbers of the layers of SmolLM2 that are kept; None for all 30.
      lengths: tokens of a query, a passage and a chat; longer ones are cut.
      overrides: of fields of the configuration, by name.
      most_measured: queries, choices, chats and tasks of a dataset that are measured on; None for
        all that are held out.
    """

    title: str
    layers: tuple[int, ...] | None
    lengths: tuple[int, int, int]
    overrides: Mapping[str, Any]
    most_measured: int | None


PRESETS = {
    "cpu": Preset(
        "all 30 layers, 40 steps, texts cut at 64 tokens",
        layers=None,
        lengths=(64, 64, 128),
        # 16 GB of memory do not hold the activations of all layers.
        overrides={"steps": 40, "optimizer.learning_rate": 2e-4, "model.remat": "full"},
        most_measured=250,
    ),
    "cpu-8": Preset(
        "8 of 30 layers, 60 steps, texts cut at 64 tokens",
        layers=(0, 1, 2, 3, 4, 5, 28, 29),
        lengths=(64, 64, 128),
        # Of 1e-4 and 4e-4, the rate that learned more in 60 steps: see RESULTS.md.
        overrides={"steps": 60, "optimizer.learning_rate": 4e-4},
        most_measured=250,
    ),
    "gpu": Preset(
        "all 30 layers, 1,500 steps",
        layers=None,
        lengths=(128, 256, 512),
        overrides={
            "steps": 1500,
            "model.dtype": "bfloat16",
            "data.embedding_batch_size": 256,
            "data.generative_batch_size": 64,
            "data.query_row_length": 512,
            "data.passage_row_length": 512,
            "data.chat_row_length": 512,
        },
        most_measured=None,
    ),
    # What the tests run: two steps of one layer.
    "tiny": Preset(
        "tiny",
        layers=(0,),
        lengths=(64, 64, 256),
        overrides={
            "steps": 2,
            "data.embedding_batch_size": 8,
            "data.generative_batch_size": 4,
            "data.embedding_batches": "mixed",
        },
        most_measured=4,
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A model to train and to measure.

    Attributes:
      name: for folders and tables.
      overrides: of fields of the configuration, by name; None for the base model as it is.
    """

    name: str
    overrides: Mapping[str, Any] | None


UNTRAINED = Run("untrained", None)
MAIN = (
    Run("embedding only", {"mode": "embedding"}),
    Run("generation only", {"mode": "generative"}),
    Run("unified", {}),
)
# The paper's ablations, each beside "unified".
ABLATIONS = (
    Run("causal, last token", {"model.attention": "cccc", "model.pooling": "lasttoken"}),
    Run("causal, weighted mean", {"model.attention": "cccc", "model.pooling": "weightedmean"}),
    Run("mixed datasets", {"data.embedding_batches": "mixed"}),
    Run("token loss", {"loss.generative_reduction": "token", "loss.generative_weight": 0.01}),
    Run("half the batch", {"data.embedding_batch_size": 32}),
)
