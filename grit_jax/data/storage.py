"""Prepared files, wherever they lie: a local folder, or a bucket as gs://BUCKET/FOLDER.

What fails for a moment is tried again; what is missing or damaged is an error that names the file.
"""

import bisect
from collections.abc import Callable, Sequence
import os
import resource
import threading
import time
from typing import Any, TypeVar

from etils import epath
import tensorstore

Result = TypeVar("Result")

# Seconds to wait before each further try.
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
# What no further try can change, in the words of the readers.
MISSING = ("no such file", "no such object", "not found", "status code: 404")
DAMAGED = ("corrupted", "hash mismatch", "should be at least")


class PreparedDataError(ValueError):
    """Prepared data is missing or unfit; the message says which and what to do."""


def read_file(path: epath.PathLike) -> bytes:
    """Returns the content of a file.

    Raises:
      PreparedDataError: it is missing, or cannot be read in several tries; the message names it.
    """
    address = os.fspath(path)
    read = _read_object if "://" in address else _read_local
    return with_retries(lambda: read(address), path)


def _read_local(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _read_object(address: str) -> bytes:
    # Not through etils, which takes TensorFlow for gs:// wherever that is installed.
    try:
        found = tensorstore.KvStore.open(address).result().read("").result()
    except ValueError as error:  # Whatever the status is that the bucket answers with.
        raise OSError(str(error)) from error
    if found.state == "missing":
        raise FileNotFoundError(address)
    return found.value


def with_retries(action: Callable[[], Result], path: epath.PathLike) -> Result:
    """Returns what `action` returns, which reads `path`, and tries again where it may help.

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


class Records:
    """The records of several ArrayRecord files, read at random by their number in all of them.

    Args:
      paths: the files, in order.
      count: number of records that there must be.

    Raises:
      PreparedDataError: a file is missing or holds too few records; the message names it.
    """

    def __init__(self, paths: Sequence[epath.Path], count: int):
        self._paths = [os.fspath(path) for path in paths]
        self._files: list[Any] = [None] * len(paths)
        self._lock = threading.Lock()
        _allow_open_files()
        counts = [len(self._open(number)) for number in range(len(paths))]
        if sum(counts) != count:
            # A file that was cut off has lost its index, and seems to be empty.
            named = [path for path, found in zip(self._paths, counts, strict=True) if not found]
            raise PreparedDataError(
                f"{', '.join(named or self._paths)}: {sum(counts)} examples are left of {count}; "
                "copy the dataset again, or prepare it anew, with --redo"
            )
        self._starts = [sum(counts[:number]) for number in range(len(counts))]

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        """Returns the records of these numbers.

        Raises:
          PreparedDataError: a file is missing or damaged; the message names it.
        """
        places: list[list[int]] = [[] for _ in self._paths]
        for place, number in enumerate(numbers):
            places[bisect.bisect_right(self._starts, number) - 1].append(place)
        records: list[bytes] = [b""] * len(numbers)
        for file, wanted in enumerate(places):
            if wanted:
                inside = [numbers[place] - self._starts[file] for place in wanted]
                for place, record in zip(wanted, self._read(file, inside), strict=True):
                    records[place] = record
        return records

    def _read(self, file: int, inside: list[int]) -> Sequence[bytes]:
        def read() -> Sequence[bytes]:
            try:
                return self._open(file).__getitems__(inside)
            except RuntimeError:
                self._files[file] = None  # A reader that has failed once fails for ever.
                raise

        return with_retries(read, self._paths[file])

    def _open(self, number: int) -> Any:
        with self._lock:
            if self._files[number] is None:
                import grain  # Preparing does without it, in every one of its processes.

                path = self._paths[number]
                self._files[number] = with_retries(
                    lambda: grain.sources.ArrayRecordDataSource(path), path
                )
            return self._files[number]


def _allow_open_files() -> None:
    """Lets this process have as many open files as it may: a shard that was read stays open.

    A shell usually asks for 1,024 of them, and a large collection has more shards.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
