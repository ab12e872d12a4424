"""A run's files that grow, in a bucket: kept on this machine, and copied there whole.

An object in a bucket cannot be added to, nor be written more than about once a second.
"""

import contextlib
import os
from pathlib import Path
import tempfile
import threading
from types import TracebackType

from etils import epath

from grit_jax.bucket import BucketError, in_bucket, one_line

SECONDS = 5.0


class Mirror:
    """A folder to write to, which a folder in a bucket follows within seconds.

    A context, at whose end the bucket has all of it. Of a folder on a disk it is that folder.

    Attributes:
      local: the folder to write to.

    Args:
      folder: the folder that follows.
    """

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._aside = tempfile.TemporaryDirectory() if in_bucket(folder) else None
        self.local = epath.Path(self._aside.name) if self._aside else folder
        self._copied: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Mirror":
        if self._aside:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._aside is None:
            return
        self._is_over.set()
        self._thread.join()
        try:
            self.flush()
        except BucketError:
            if error is None:
                raise
        finally:
            self._aside.cleanup()

    def flush(self) -> None:
        """Returns when the bucket has all that has been written.

        Raises:
          BucketError: it cannot be written to.
        """
        if self._aside is None:
            return
        try:
            self._copy_changed(Path(self._aside.name))
        except Exception as error:  # Whatever the libraries below make of it.
            raise BucketError(f"{self._folder} cannot be written to: {one_line(error)}") from error

    def _follow(self) -> None:
        while not self._is_over.wait(SECONDS):
            # It is tried again, and whoever calls `flush` is told if that fails, too.
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
