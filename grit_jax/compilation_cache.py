"""JAX's persistent compilation cache: folders of compiled programs for later processes."""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path

from etils import epath
import filelock
import jax

from grit_jax.bucket import in_bucket

# The least recently used programs are deleted beyond this size of a folder.
MAX_BYTES = 2 * 2**30
# Programs that compile faster than this are not stored.
MIN_COMPILE_SECONDS = 0.2
LOCK_TIMEOUT = 10  # In seconds, as in JAX.


@contextlib.contextmanager
def compilation_cache(folder: epath.Path) -> Iterator[None]:
    """Keeps programs in `folder` during the block, unless JAX is configured to keep them elsewhere.

    Args:
      folder: a folder on a disk or in a bucket.
    """
    options = _options(folder)
    before = {name: getattr(jax.config, name) for name in options}
    if not before["jax_compilation_cache_dir"]:
        _update_jax(options)
    try:
        yield
    finally:
        _update_jax(before)


def use_user_cache() -> None:
    """Keeps programs in `user_folder()`, unless JAX is configured to keep them elsewhere or not.

    JAX_COMPILATION_CACHE_DIR chooses another folder, and JAX_ENABLE_COMPILATION_CACHE=false
    switches the cache off. If the folder cannot be written to, programs are not kept.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    with contextlib.suppress(OSError, RuntimeError):  # No home folder, or a read-only one.
        folder = user_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # Programs of others are not trusted.
        options = _options(epath.Path(folder))
        if "jax_compilation_cache_max_size" in options:
            options["jax_persistent_cache_min_compile_time_secs"] = MIN_COMPILE_SECONDS
            _update_jax(options)


def user_folder() -> Path:
    """Returns the user's folder of compiled programs, by default ~/.cache/grit_jax/compiled.

    Raises:
      RuntimeError: the user has no home folder.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "grit_jax" / "compiled"


def _options(folder: epath.Path) -> dict[str, str | int | float]:
    """Returns the options of JAX that keep programs in a folder.

    On a disk, JAX locks the folder and bounds its size. Unfinished programs are deleted: a process
    that is killed while it writes one would make all later ones warn that they cannot read it.
    """
    options: dict[str, str | int | float] = {"jax_compilation_cache_dir": os.fspath(folder)}
    if in_bucket(folder):
        # XLA's own caches, on GPUs, can only be on a disk. Objects are always complete.
        return options | {"jax_persistent_cache_enable_xla_caches": "none"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(Path(folder) / ".lockfile", timeout=LOCK_TIMEOUT):  # JAX's.
            for program in Path(folder).glob("*-cache"):
                if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
                    program.unlink()
    except (OSError, NotImplementedError):  # A read-only folder, or a file system without locks.
        return options
    return options | {"jax_compilation_cache_max_size": MAX_BYTES}


def _update_jax(options: dict[str, str | int | float]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
