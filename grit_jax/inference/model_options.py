"""The options by which a command is told which model to use, and how."""

import argparse
from pathlib import Path

from grit_jax.inference.gritlm import GritLM
from grit_jax.objectives.embedding import PATTERNS
from grit_jax.objectives.pooling import POOLINGS


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the model and how it was trained to what a command takes."""
    parser.add_argument("model", help="a Hugging Face folder, a GGUF file, a checkpoint or a run")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--linear-dtype", choices=("int8",), help="of linear layers' weights")
    pattern = "the pattern of its training (the model's own)"
    parser.add_argument("--attention", choices=PATTERNS, help=pattern)
    parser.add_argument("--pooling", choices=POOLINGS, help="of its embeddings (the model's own)")
    parser.add_argument("--tokenizer", help="path of a tokenizer (the model's own)")
    parser.add_argument("--base", type=Path, help="where LoRA's base model lies, if it moved")


def load_model(arguments: argparse.Namespace) -> GritLM:
    """Returns the model that `add_model_options` was told of.

    Raises:
      ConversionError, FileNotFoundError, ValueError: see `GritLM.from_pretrained`.
    """
    return GritLM.from_pretrained(
        arguments.model,
        dtype=arguments.dtype,
        linear_dtype=arguments.linear_dtype,
        attention=arguments.attention,
        pooling=arguments.pooling,
        tokenizer=arguments.tokenizer,
        base=arguments.base,
    )
