"""Files that may be compressed by gzip or zstd, as their names say."""

import gzip
import io
from typing import Any, BinaryIO
import zlib

from etils import epath

# Suffixes of compressed files.
COMPRESSION_SUFFIXES = (".gz", ".zst")
# What can go wrong while a stored or compressed file is read.
READ_ERRORS = (OSError, EOFError, zlib.error)
CHUNK_BYTES = 2**20


def without_compression_suffix(name: str) -> str:
    """Returns a file name without .gz or .zst."""
    for suffix in COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def decompress(path: epath.PathLike, stored: BinaryIO) -> Any:
    """Returns the content of an open file as a stream, decompressed if its name says so.

    Args:
      path: the file's path.
      stored: the file, opened.
    """
    name = str(path)
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=stored)
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdReader(stored), CHUNK_BYTES)
    return stored


def start_of_file(path: epath.PathLike, num_bytes: int) -> bytes:
    """Returns the first bytes of a file's content.

    Raises:
      EOFError, OSError, zlib.error: the file cannot be read or is damaged.
    """
    with epath.Path(path).open("rb") as stored:
        return decompress(path, stored).read(num_bytes)  # pyright: ignore[reportArgumentType]


class _ZstdReader(io.RawIOBase):
    """Decompresses frame after frame, and raises EOFError if the last one is incomplete."""

    def __init__(self, stored: BinaryIO):
        import zstandard

        self._stored = stored
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._frame, self._input, self._output = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._stored.read(CHUNK_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the compressed file ends before its end-of-frame marker")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._output = self._frame.decompress(self._input)
            except self._error as error:
                raise OSError(str(error)) from None
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count
