"""Measures speed and memory of weight conversion: python benchmarks/convert.py [--layers N]

Creates a random bfloat16 checkpoint with the shapes of Mistral 7B (14.5 GB; fewer layers take less)
in Hugging Face's format, converts it to an Orbax checkpoint and back, and copies it for comparison.
Needs five times its size on disk, minus the files that already exist in `--folder`.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from grit_jax.conversion.layout import parameters
from grit_jax.models import ModelConfig, config_to_hugging_face

SHARD_BYTES = 4 * 2**30
COMMAND = [sys.executable, "-m", "grit_jax", "convert"]


def main() -> None:
    """Creates the checkpoint, converts it both ways, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32, help="number of layers (32)")
    parser.add_argument("--folder", type=Path, help="working folder (default: temporary)")
    options = parser.parse_args()
    config = dataclasses.replace(ModelConfig(), num_hidden_layers=options.layers)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        # In a subprocess: a command's peak memory includes that of its parent.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            size = pool.apply(make_checkpoint, (config, root / "hf"))
        steps = {
            "copy": ["cp", "-r", str(root / "hf"), str(root / "copy")],
            "from-hf": [*COMMAND, "from-hf", str(root / "hf"), str(root / "orbax")],
            "to-hf": [*COMMAND, "to-hf", str(root / "orbax"), str(root / "back")],
        }
        table = Table(title=f"{size / 1e9:.1f} GB of bfloat16, {options.layers} layers")
        for column in ("", "seconds", "GB/s", "peak resident GB"):
            table.add_column(column, justify="right" if column else "left")
        for name, command in steps.items():
            seconds, peak = timed(command)
            table.add_row(
                name, f"{seconds:.1f}", f"{size / 1e9 / seconds:.2f}", f"{peak / 1e9:.2f}"
            )
            if name == "copy":
                shutil.rmtree(root / "copy")
        Console().print(table)


def make_checkpoint(config: ModelConfig, folder: Path) -> int:
    """Writes a random checkpoint in files of 4 GB and returns its size in bytes."""
    folder.mkdir()
    random = np.random.default_rng(0)
    content, weight_map, total, filled = {}, {}, 0, 0

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(content, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(content, name))
        content.clear()

    for parameter in parameters(config):
        for _, name in parameter.tensors():
            bits = random.integers(0, 2**16, parameter.tensor_shape, np.uint16)
            # Exponents of numbers between 2^-15 and 2; random bits would include infinities.
            tensor = ((bits & 0x87FF) | 0x3800).view(ml_dtypes.bfloat16)
            content[name] = tensor
            total, filled = total + tensor.nbytes, filled + tensor.nbytes
            if filled > SHARD_BYTES:
                flush()
                filled = 0
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_to_hugging_face(config)))
    return total


def timed(command: list[str]) -> tuple[float, int]:
    """Returns the seconds and the peak resident memory (bytes) of a command."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    assert status == 0, f"{command} failed"
    return time.perf_counter() - start, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
