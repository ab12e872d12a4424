"""Evaluates a model on the held-out data: python -m experiments.measure_model MODEL DATA"""

import argparse
from collections.abc import Sequence
import os
from pathlib import Path
import sys

import jax
from rich.console import Console

from experiments.gritlm import Measured
from experiments.measure import (
    Measures,
    by_embeddings,
    measure_choices,
    measure_perplexity,
    measure_reasoning,
    measure_retrieval,
    measures_table,
)
from grit_jax import GritLM
from grit_jax.conversion import ConversionError
from grit_jax.files import write_json
from grit_jax.inference.prompt_encoder import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table, and writes the measures and the device to a file if one is named.

    Returns 1, with a line, if the model or the data cannot be read.
    """
    parser = argparse.ArgumentParser(description="Evaluate a model on the held-out data.")
    parser.add_argument("model", type=Path, help="the folder of a run, or any other model")
    parser.add_argument("data", type=Path, help="output of experiments.build_data")
    parser.add_argument(
        "--max-length", type=int, default=512, help="maximum tokens of an embedded text (512)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    try:
        model = GritLM.from_pretrained(options.model, dtype="float32")
        measures = measure_model(model, options.data, options.max_length)
    except (ConversionError, InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.output:
        write_json(options.output, {"measures": measures, "device": device()})
    Console().print(measures_table({options.model.name: measures}))
    return 0


def measure_model(model: GritLM, folder: Path, max_length: int) -> Measures:
    """Returns all measures of a model on the held-out data in `folder`."""
    measured = Measured(model, max_length=max_length)
    return {
        **measure_retrieval(by_embeddings(measured.encode), folder),
        **measure_choices(measured.likelihoods, folder),
        **measure_reasoning(measured.generate, folder),
        **measure_perplexity(measured.likelihoods, folder),
    }


def device() -> str:
    """Returns a description of the devices and CPU cores."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())
