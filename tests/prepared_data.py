"""Small prepared datasets for tests, of texts as short as is handy, written without preparing."""

from pathlib import Path
import tempfile

from etils import epath
import numpy as np

from grit_jax.data.manifest import PreparedDataset
from grit_jax.prepare.writing import put_in_place, write_dataset, write_part
from grit_jax.text.examples import ChatExample, EmbeddingExample, Text


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


def write_prepared(folder, name, examples, examples_a_shard=10_000):
    """Writes the split "train" of a dataset, in shards of so many examples."""
    kind = "generative" if isinstance(examples[0], ChatExample) else "embedding"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        incomplete = Path(temporary) / name
        parts = [
            write_part(incomplete / "train", number, examples[first : first + examples_a_shard])
            for number, first in enumerate(range(0, len(examples), examples_a_shard))
        ]
        tokenizer = {"name": "none", "sha256": "", "vocab_size": 4}
        write_dataset(incomplete / "train", kind, parts, options={}, tokenizer=tokenizer)
        put_in_place(incomplete, epath.Path(folder) / name)


def open_datasets(folder, rates):
    return {PreparedDataset(folder, name, "train"): rate for name, rate in rates.items()}
