"""Presets of the experiment, and its training runs."""

from collections.abc import Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Preset:
    """A scale of the experiment.

    Attributes:
      title: title in tables.
      layers: indices of the layers of SmolLM2 that are kept; None keeps all 30.
      lengths: maximum tokens of a query, a passage and a chat; longer texts are truncated.
      overrides: values of configuration fields, by name.
      most_measured: maximum number of held-out queries, choices, chats and tasks per dataset; None
        evaluates on all.
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
        # The activations of all layers do not fit in 16 GB.
        overrides={"steps": 40, "optimizer.learning_rate": 2e-4, "model.remat": "full"},
        most_measured=250,
    ),
    "cpu-8": Preset(
        "8 of 30 layers, 60 steps, texts cut at 64 tokens",
        layers=(0, 1, 2, 3, 4, 5, 28, 29),
        lengths=(64, 64, 128),
        # Better than 1e-4 after 60 steps: see RESULTS.md.
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
    # For tests: two steps with one layer.
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
    """A model to train and evaluate.

    Attributes:
      name: name in folders and tables.
      overrides: values of configuration fields, by name; None evaluates the base model untrained.
    """

    name: str
    overrides: Mapping[str, Any] | None


UNTRAINED = Run("untrained", None)
MAIN = (
    Run("embedding only", {"mode": "embedding"}),
    Run("generation only", {"mode": "generative"}),
    Run("unified", {}),
)
# The paper's ablations, each compared with "unified".
ABLATIONS = (
    Run("causal, last token", {"model.attention": "cccc", "model.pooling": "lasttoken"}),
    Run("causal, weighted mean", {"model.attention": "cccc", "model.pooling": "weightedmean"}),
    Run("mixed datasets", {"data.embedding_batches": "mixed"}),
    Run("token loss", {"loss.generative_reduction": "token", "loss.generative_weight": 0.01}),
    Run("half the batch", {"data.embedding_batch_size": 32}),
)
