"""Computes the memory that a 7B model needs on one TPU chip to embed and to generate.

    python benchmarks/inference_memory.py --linear-dtype int8

Compiles the programs of `GritLM` for one chip and prints the compiler's memory analysis. Needs no
TPU, but some minutes and the package libtpu.

    --linear-dtype int8     see `GritLM.from_pretrained`
    --rows, --slots         prompts in a batch, and tokens of prompt and answer
"""

import argparse
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from grit_jax.data.batch import PackedTexts
from grit_jax.inference.batch_packing import MIN_TOKENS_PER_TEXT, TOKENS_PER_DEVICE
from grit_jax.inference.encode import Encoder
from grit_jax.inference.generate import PREFILL_LENGTHS, GenerationState, Generator
from grit_jax.inference.loading import abstract_module
from grit_jax.inference.sampling import Sampling
from grit_jax.models import ModelConfig
from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.planning.chips import describe_topology, suppress_stderr
from grit_jax.sharding import make_mesh

ROW_LENGTH = 512


def main() -> None:
    """Compiles the programs, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x2", help="topology of which one chip is used")
    parser.add_argument("--linear-dtype", choices=("int8",), default=None)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--slots", type=int, default=1024)
    options = parser.parse_args()
    with suppress_stderr():
        devices = describe_topology(options.topology).devices[:1]
    mesh = make_mesh(devices=devices)
    config = ModelConfig(
        dtype="bfloat16", param_dtype="bfloat16", linear_dtype=options.linear_dtype
    )
    model = nnx.merge(*abstract_module(config, mesh))
    table = Table(
        title=f"7B on one chip of {options.topology}, {options.linear_dtype or 'bfloat16'}"
    )
    for column in ("program", "weights and caches, GB", "temporary, GB", "total, GB"):
        table.add_column(column, justify="left" if column == "program" else "right")
    with jax.set_mesh(mesh):
        for name, compiled in compile_programs(model, mesh, options.rows, options.slots):
            memory: Any = compiled.memory_analysis()
            kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
            kept -= memory.alias_size_in_bytes
            sizes = (kept, memory.temp_size_in_bytes, kept + memory.temp_size_in_bytes)
            table.add_row(name, *(f"{size / 1e9:.2f}" for size in sizes))
    Console(width=100).print(table)


def compile_programs(model: Any, mesh: Any, rows: int, slots: int) -> Any:
    """Yields the name of each program, and the compiled program."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def abstract(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)

    def integers(*shape: int) -> Any:
        return abstract(shape, jnp.int32)

    encoder, packed = Encoder(model, mesh), (TOKENS_PER_DEVICE // ROW_LENGTH, ROW_LENGTH)
    count = TOKENS_PER_DEVICE // MIN_TOKENS_PER_TEXT
    batch = PackedTexts(*(integers(*packed) for _ in range(3)), abstract(packed, bool), count)
    lowered = encoder.program.lower(encoder.parameters, batch, EmbeddingSpec())
    yield f"embed {TOKENS_PER_DEVICE:,} tokens", lowered.compile()

    generator, end_tokens = Generator(model, mesh), integers(1)
    cache = jax.eval_shape(lambda: model.make_cache(rows, slots))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    is_done = abstract((rows,), bool)
    state = GenerationState(cache, integers(rows), integers(), is_done, keys, None)
    state = jax.tree.map(lambda leaf: abstract(leaf.shape, leaf.dtype), state)
    chunk = integers(rows, PREFILL_LENGTHS[-1])
    arguments = (generator.parameters, state)
    lowered = generator.prefill.lower(*arguments, chunk, chunk, end_tokens, Sampling(), True)
    yield f"prefill {rows} x {PREFILL_LENGTHS[-1]} tokens", lowered.compile()
    lowered = generator.decode.lower(*arguments, integers(), end_tokens, Sampling())
    yield f"decode, {rows} x {slots:,} slots", lowered.compile()


if __name__ == "__main__":
    main()
