"""What all tests share: eight devices, and the embedded sample prepared once."""

import os

# Before jax is imported: a CPU stands for eight devices, and compiling takes half the time.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

from command_line import ROOT, grit_jax
import pytest


def pytest_configure(config):
    """Keeps what is compiled, most of the tests' time, for other tests and for the next run."""
    import jax

    # Both for this process, whose other conftest.py may have imported jax, and for its children.
    folder = str(config.cache.mkdir("compiled"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="session")
def prepared_sample(tmp_path_factory):
    """The folder of the embedded sample, prepared by the command that a user types."""
    folder = tmp_path_factory.mktemp("prepared") / "sample"
    sources = ("sample_embedding", "sample_chat")
    finished = grit_jax("prepare", *sources, "--output", folder, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    return folder
