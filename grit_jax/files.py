"""Atomic writes and hashes of JSON, and locks on folders."""

from collections.abc import Iterator
import contextlib
import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from etils import epath


def write_json(path: Path | epath.Path, content: Any) -> None:
    """Writes an indented JSON file atomically."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def write_atomically(path: Path | epath.Path, text: str) -> None:
    """Writes a file such that readers see either the whole new file or the old one."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    unfinished.write_text(text)
    unfinished.replace(path)


def json_sha256(value: Any) -> str:
    """Returns the SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], refusal: Exception | None = None) -> Iterator[None]:
    """A context manager that holds the lock of a folder, also released when the process ends.

    File systems without locks are not locked.

    Args:
      folder: an existing folder on a disk. The lock is on the file `.lock` in it.
      refusal: raised if another process holds the lock; None waits for the lock.

    Raises:
      OSError: the folder cannot be written to.
    """
    with (Path(folder) / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if refusal is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            assert refusal is not None
            raise refusal from None
        except OSError:  # A file system without locks.
            pass
        yield
