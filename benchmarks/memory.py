"""Measures the memory of a step, with and without GradCache: python benchmarks/memory.py [--small]

Compiles the joint step of a 124.7 M Mistral for one CPU device and prints the compiler's memory
analysis, without running the step. Texts have 64 tokens, four per row; chunks have 256 queries.
"""

import argparse

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from grit_jax.config import default_config, parse_config
from grit_jax.data.batch import Batch, ChatBatch, EmbeddingBatch, PackedTexts
from grit_jax.from_config import make_trainer

SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
ROW_LENGTH, TEXTS_A_ROW, QUERIES_A_CHUNK = 256, 4, 256


def main() -> None:
    """Compiles the steps and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="batches up to 1024 only")
    batch_sizes = [256, 512, 1024, 2048, 4096, 8192]
    if parser.parse_args().small:
        batch_sizes = batch_sizes[:3]
    table = Table(title="temporary memory of a step (GB), plus 1.5 GB of parameters and moments")
    for column in ("queries", "undivided", "chunks", "with GradCache"):
        table.add_column(column, justify="right")
    for batch_size in batch_sizes:
        chunks = batch_size // QUERIES_A_CHUNK
        whole, divided = temporary_bytes(batch_size, 1), temporary_bytes(batch_size, chunks)
        table.add_row(f"{batch_size}", f"{whole / 1e9:.2f}", f"{chunks}", f"{divided / 1e9:.2f}")
    Console().print(table)


def temporary_bytes(batch_size: int, chunks: int) -> int:
    """Returns the bytes that the compiled step needs besides its arguments and results."""
    config = default_config()
    config.model.sizes = SIZES
    config.model.dtype = "float32"
    config.grad_cache_chunks = chunks
    trainer = make_trainer(parse_config(config))
    with jax.set_mesh(trainer.mesh):
        compiled = trainer.step.lower(trainer.abstract_state(), make_batch(batch_size)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def make_batch(batch_size: int) -> Batch:
    """Returns the shapes of a batch with two passages per query and one chat per eight queries."""

    def texts(count: int) -> PackedTexts:
        shape = (count // TEXTS_A_ROW, ROW_LENGTH)
        ids, mask = (jax.ShapeDtypeStruct(shape, kind) for kind in (np.int32, np.bool_))
        return PackedTexts(ids, ids, ids, mask, num_texts=count)

    def indices(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count,), np.int32)

    pairs = EmbeddingBatch(
        texts(batch_size), texts(2 * batch_size), indices(batch_size), indices(2 * batch_size)
    )
    chats = ChatBatch(texts(batch_size // 8))
    return Batch({"embedding": pairs, "generative": chats})


if __name__ == "__main__":
    main()
