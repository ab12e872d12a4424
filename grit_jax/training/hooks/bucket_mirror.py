"""Mirrors a local folder to a bucket, for files that a run appends to.

Objects in a bucket cannot be appended to, and can be overwritten only about once a second.
"""

import contextlib
import os
from pathlib import Path
import tempfile
import threading
from types import TracebackType

from etils import epath

from grit_jax.bucket import BucketError, in_bucket, one_line

COPY_SECONDS = 5.0


class BucketMirror:
    """A local folder whose changed files are copied to a bucket every few seconds.

    A context manager that copies the last changes at its end. If `folder` is on a disk, it is used
    directly, and nothing is copied.

    Attributes:
      local: the folder to write to.

    Args:
      folder: the folder to copy to.
    """

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._temporary = tempfile.TemporaryDirectory() if in_bucket(folder) else None
        self.local = epath.Path(self._temporary.name) if self._temporary else folder
        self._copied: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._copy_repeatedly, daemon=True)

    def __enter__(self) -> "BucketMirror":
        if self._temporary:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._temporary is None:
            return
        self._is_over.set()
        self._thread.join()
        try:
            self.flush()
        except BucketError:
            if error is None:
                raise
        finally:
            self._temporary.cleanup()

    def flush(self) -> None:
        """Copies all changed files and returns when they are in the bucket.

        Raises:
          BucketError: the bucket cannot be written to.
        """
        if self._temporary is None:
            return
        try:
            self._copy_changed(Path(self._temporary.name))
        except Exception as error:  # gcsfs raises many types.
            raise BucketError(f"{self._folder} cannot be written to: {one_line(error)}") from error

    def _copy_repeatedly(self) -> None:
        while not self._is_over.wait(COPY_SECONDS):
            # The copy is tried again. The next caller of `flush` gets the error if it persists.
            with contextlib.suppress(BucketError):
                self.flush()

    def _copy_changed(self, local: Path) -> None:
        with self._lock:
            for path in sorted(local.rglob("*")):
                if not path.is_file():
                    continue
                stat = path.stat()
                state = (stat.st_mtime_ns, stat.st_size)
                if self._copied.get(path) != state:
                    (self._folder / os.fspath(path.relative_to(local))).write_bytes(
                        path.read_bytes()
                    )
                    self._copied[path] = state
