"""Command-line options that choose a model and how to load it."""

import argparse

from grit_jax.inference.gritlm import GritLM
from grit_jax.objectives.embedding import PATTERNS
from grit_jax.objectives.pooling import POOLINGS


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the model and the options of `GritLM.from_pretrained` to a command."""
    parser.add_argument("model", help="a Hugging Face folder, a GGUF file, a checkpoint or a run")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="(bfloat16)"
    )
    parser.add_argument(
        "--linear-dtype", choices=("int8",), help="quantize the weights of linear layers"
    )
    parser.add_argument(
        "--attention", choices=PATTERNS, help="attention pattern of the training (as stored)"
    )
    parser.add_argument("--pooling", choices=POOLINGS, help="pooling of embeddings (as stored)")
    parser.add_argument("--tokenizer", help="path of a tokenizer (the model's own)")
    parser.add_argument("--base", help="base model of a LoRA checkpoint or adapter (as stored)")


def load_model(arguments: argparse.Namespace) -> GritLM:
    """Returns the model that the options of `add_model_options` choose.

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
