"""What all tests share: eight devices, and the embedded sample prepared once."""

import os
from pathlib import Path
import subprocess
import sys

# Before jax is imported: a CPU stands for eight devices, and compiling takes half the time.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def prepared_sample(tmp_path_factory):
    """The folder of the embedded sample, prepared by the command that a user types."""
    folder = tmp_path_factory.mktemp("prepared") / "sample"
    script = "from grit_jax.cli import main; main()"
    command = [sys.executable, "-c", script, "prepare", "sample_embedding", "sample_chat"]
    finished = subprocess.run(
        [*command, "--output", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return folder
