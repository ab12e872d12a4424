"""Fixtures for all tests: eight CPU devices, small models, and the prepared embedded sample."""

import os

# Set before jax is imported: eight devices on one CPU, and half the compile time.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import contextlib
import functools
from pathlib import Path

from command_line import ROOT, grit_jax
from hypothesis import settings
import pytest

REFERENCE = Path(__file__).parent / "reference"


# How long an example takes depends on the machine.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


def pytest_configure(config):
    """Caches compiled programs on disk: compiling takes most of the tests' time."""
    import jax

    # The variables are for child processes; another conftest.py may have imported jax already.
    folder = str(config.cache.mkdir("compiled"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="session")
def prepared_sample(tmp_path_factory):
    """The folder of the embedded sample, prepared with `grit-jax prepare`."""
    folder = tmp_path_factory.mktemp("prepared") / "sample"
    sources = ("sample_embedding", "sample_chat")
    finished = grit_jax("prepare", *sources, "--output", folder, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="session")
def reference_model():
    """A function that loads a tiny model of the original, which takes token ids.

    Its options are those of `GritLM.from_pretrained`. Models and compiled programs are cached.
    """
    from small_model import one_device

    from grit_jax import GritLM
    from grit_jax.sharding import make_mesh

    @functools.cache
    def make(architecture="mistral", on_eight_devices=False, **options):
        mesh = make_mesh(fsdp=4, tensor=2) if on_eight_devices else one_device()
        folder = REFERENCE / f"tiny-{architecture}"
        return GritLM.from_pretrained(folder, dtype="float32", mesh=mesh, **options)

    return make


@pytest.fixture(scope="session")
def count_compilations():
    """A context manager that yields a list of the names of the programs compiled in it."""
    import jax

    lists = []

    def listen(event, _, fun_name="", **__):
        if event == "/jax/core/compile/backend_compile_duration":
            for entries in lists:
                entries.append(fun_name)

    @contextlib.contextmanager
    def counted():
        entries = []
        lists.append(entries)
        yield entries
        lists.remove(entries)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return counted


@pytest.fixture(scope="session")
def model():
    """A small random model with Mistral's tokenizer."""
    from small_model import small_model

    return small_model()
