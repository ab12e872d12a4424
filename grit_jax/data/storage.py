"""Reads prepared files from a local folder or from a bucket (gs://BUCKET/FOLDER).

Transient failures are retried. A missing or damaged file is an error that names the file.
"""

from collections.abc import Callable, Sequence
import copy
import functools
import os
import resource
import time
from typing import Any

from etils import epath
import tensorstore

# Seconds to wait before each retry.
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
# Words in error messages of the readers for which a retry cannot help.
MISSING = ("no such file", "no such object", "not found", "status code: 404")
DAMAGED = ("corrupted", "hash mismatch", "should be at least")


class PreparedDataError(ValueError):
    """Prepared data is missing, damaged or unsuitable; the message names it and says what to do."""


def read_file(path: epath.PathLike) -> bytes:
    """Returns the content of a file.

    Raises:
      PreparedDataError: the file is missing, or every try to read it failed; the message names it.
    """
    address = os.fspath(path)
    read = _read_object if "://" in address else _read_local
    return with_retries(lambda: read(address), path)


def _read_local(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _read_object(address: str) -> bytes:
    # Not with etils, which imports TensorFlow for gs:// if TensorFlow is installed.
    try:
        found = tensorstore.KvStore.open(address).result().read("").result()
    except ValueError as error:  # tensorstore raises it for every status of the bucket.
        raise OSError(str(error)) from error
    if found.state == "missing":
        raise FileNotFoundError(address)
    return found.value


def with_retries[Result](action: Callable[[], Result], path: epath.PathLike) -> Result:
    """Returns the result of `action`, which reads `path`; retries transient failures.

    Raises:
      PreparedDataError: the file is missing or damaged, or all tries failed.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except (OSError, RuntimeError) as error:
            words = str(error).lower()
            if isinstance(error, FileNotFoundError) or any(word in words for word in MISSING):
                raise PreparedDataError(
                    f"{path} does not exist: prepare the dataset first, or copy all of its folder"
                ) from error
            if any(word in words for word in DAMAGED):
                raise PreparedDataError(
                    f"{path} is damaged: copy it again, or prepare it anew, with --redo ({error})"
                ) from error
            if wait is None:
                raise PreparedDataError(
                    f"{path} cannot be read in {len(WAITS) + 1} tries ({error})"
                ) from error
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


class RecordReader:
    """Random access to the records of several ArrayRecord files, as if they were one.

    It is grain's data source with retries, and with errors that name the file.

    Args:
      paths: the files, in order.
      count: the number of records that the files must hold together.

    Raises:
      PreparedDataError: a file is missing, damaged or truncated; the message names it.
    """

    def __init__(self, paths: Sequence[epath.PathLike], count: int):
        self._paths = [os.fspath(path) for path in paths]
        _raise_open_file_limit()
        try:
            self._source = _open_records(self._paths)
        except (OSError, RuntimeError):
            self._count_by_file()  # Raises the error that names the file, if it persists.
            self._source = _open_records(self._paths)
        if len(self._source) != count:
            # A truncated file has lost its index, and appears to be empty.
            counts = zip(self._paths, self._count_by_file(), strict=True)
            empty = [path for path, found in counts if not found]
            raise PreparedDataError(
                f"{', '.join(empty or self._paths)}: {len(self._source)} examples are left of "
                f"{count}; copy the dataset again, or prepare it anew, with --redo"
            )

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """Returns the records at these indices.

        Raises:
          PreparedDataError: a file is missing or damaged; the message names it.
        """
        try:
            return list(self._source.__getitems__(indices))
        except (OSError, RuntimeError):
            self._source = copy.copy(self._source)  # With new readers: a failed one never recovers.
            return self._read_by_file(indices)

    def _read_by_file(self, indices: Sequence[int]) -> list[bytes]:
        """Returns the records at these indices, with retries for each file."""
        records: dict[int, bytes] = {}
        start = 0
        for path, count in zip(self._paths, self._count_by_file(), strict=True):
            own = [index for index in indices if start <= index < start + count]
            if own:
                in_file = [index - start for index in own]
                found = with_retries(functools.partial(_read_records, path, in_file), path)
                records |= zip(own, found, strict=True)
            start += count
        return [records[index] for index in indices]

    def _count_by_file(self) -> list[int]:
        """Returns the number of records of each file."""
        return [with_retries(functools.partial(_count_records, path), path) for path in self._paths]


def _open_records(paths: Sequence[str]) -> Any:
    import grain  # `grit-jax prepare` never reads records, and its workers start without grain.

    return grain.sources.ArrayRecordDataSource(paths)


def _read_records(path: str, indices: Sequence[int]) -> Sequence[bytes]:
    return _open_records([path]).__getitems__(indices)


def _count_records(path: str) -> int:
    return len(_open_records([path]))


def _raise_open_file_limit() -> None:
    """Raises this process's soft limit of open files to the hard limit.

    Shards stay open once read. A shell usually allows 1,024 files, and a large dataset has more
    shards.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
