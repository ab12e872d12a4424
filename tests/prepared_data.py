"""Small prepared datasets of short random texts, written directly for tests."""

from pathlib import Path
import tempfile

from etils import epath
import numpy as np

from grit_jax.data.manifest import PreparedDataset
from grit_jax.prepare.writing import publish, write_dataset, write_shard
from grit_jax.text.examples import ChatExample, EmbeddingExample, Text
from grit_jax.text.kinds import TEXT_KINDS


def text(random, longest):
    length = int(random.integers(1, longest + 1))
    # Few different tokens, so that some short texts are equal.
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


def write_prepared(folder, name, examples, examples_a_shard=10_000):
    """Writes the split "train" of a dataset, with `examples_a_shard` examples per shard."""
    kind = next(k.name for k in TEXT_KINDS.values() if type(examples[0]) is k.example)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        incomplete = Path(temporary) / name
        shards = [
            write_shard(incomplete / "train", number, examples[first : first + examples_a_shard])
            for number, first in enumerate(range(0, len(examples), examples_a_shard))
        ]
        tokenizer = {"name": "none", "sha256": "", "vocab_size": 4}
        write_dataset(incomplete / "train", kind, shards, options={}, tokenizer=tokenizer)
        publish(incomplete, epath.Path(folder) / name)


def open_datasets(folder, rates):
    return {PreparedDataset(folder, name, "train"): rate for name, rate in rates.items()}
