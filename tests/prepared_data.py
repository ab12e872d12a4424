"""Prepared datasets without preparing: examples written as `grit-jax prepare` writes them."""

from pathlib import Path
import tempfile

from etils import epath

from grit_jax.data.examples import ChatExample
from grit_jax.data.writing import put_in_place, write_dataset, write_part


def write_prepared(folder, name, examples, examples_a_shard=100):
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
