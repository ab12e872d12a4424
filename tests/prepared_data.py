"""Small prepared datasets for tests, of texts as short as is handy."""

import numpy as np

from grit_jax.data import prepare
from grit_jax.data.examples import ChatExample, EmbeddingExample, Text
from grit_jax.data.manifest import Manifest, PreparedDataset


def text(random, longest):
    length = int(random.integers(1, longest + 1))
    # Few different tokens: short texts are then copies of each other now and then.
    return Text(random.integers(1, 4, length).astype(np.int32), random.random(length) < 0.5)


def embedding_examples(random, count, longest):
    return [
        EmbeddingExample(
            query=text(random, longest),
            positives=[text(random, longest) for _ in range(random.integers(1, 3))],
            negatives=[text(random, longest) for _ in range(random.integers(0, 4))],
        )
        for _ in range(count)
    ]


def chat_examples(random, count, longest):
    return [ChatExample(text(random, longest)) for _ in range(count)]


def write_dataset(folder, name, examples):
    """Writes examples as `grit-jax prepare` does, which needs no TensorFlow for it."""
    kind = "generative" if isinstance(examples[0], ChatExample) else "embedding"
    manifest = Manifest(
        kind=kind,
        count=len(examples),
        longest=prepare._longest(kind, examples),
        options={},
        tokenizer={"name": "none", "sha256": "", "vocab_size": 4},
        rejected={},
        shards=["examples.arrayrecord"],
    )
    prepare._write_dataset(folder / name / "train", manifest, examples)


def open_datasets(folder, rates):
    return {PreparedDataset(folder, name, "train"): rate for name, rate in rates.items()}
