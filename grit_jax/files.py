"""Files and folders on disk: atomic JSON files, a hash of JSON, and a lock on a folder."""

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
    """Writes an indented JSON file atomically: readers see the old file or the new one."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)


def json_sha256(value: Any) -> str:
    """Returns the SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], refusal: Exception | None = None) -> Iterator[None]:
    """Keeps a folder's lock until the end of the `with`; it is let go with the process, too.

    A file system without locks keeps nobody out.

    Args:
      folder: is there, on a disk; the lock is the file `.lock` in it.
      refusal: is raised where another process has the lock; None waits for it.

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
