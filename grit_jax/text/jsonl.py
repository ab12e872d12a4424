"""JSON lines and JSON arrays: one process reads blocks of numbered lines, and many parse them."""

import abc
import codecs
from collections.abc import Callable, Iterator
import dataclasses
import functools
import hashlib
import io
import json
import re
import shlex
from typing import Any

from etils import epath

from grit_jax.text.compression import READ_ERRORS, decompress, start_of_file
from grit_jax.text.examples import RejectedExample
from grit_jax.text.json_stream import JsonError, JsonStream

MEGABYTE = 2**20
# A file with longer lines is probably not a JSONL file.
MAX_LINE_BYTES = 16 * MEGABYTE
LINE_TOO_LONG = f"line over {MAX_LINE_BYTES // MEGABYTE} MB"

# Read from a file to recognize its format.
START_BYTES = 4096
# First bytes of files compressed by gzip, zip, zstd, bzip2 and xz.
COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")
# The start of a JSON array of objects.
ARRAY = re.compile(rb"\s*\[\s*(\{|$)")

# The number of a row in its file, bytes that identify it, and a function that returns its fields.
Row = tuple[int, bytes, Callable[[], dict[str, Any]]]


class SourceError(ValueError):
    """A source of data is missing, unreadable or wrongly declared; the message says what to do."""


class Block(abc.ABC):
    """Consecutive rows of a file.

    Attributes:
      first_row: number of the first row, counted from 1.
      position: bytes of the stored (maybe compressed) file read up to the end of the block.
    """

    first_row: int
    position: int

    @abc.abstractmethod
    def rows(self) -> Iterator[Row]:
        """Yields the rows; the function of an unusable row raises RejectedExample."""


@dataclasses.dataclass(frozen=True)
class LinesBlock(Block):
    """Whole lines of JSON.

    Attributes:
      first_row: number of the first line, counted from 1.
      data: the lines; empty if the block is one line over `MAX_LINE_BYTES`.
      position: bytes of the stored (maybe compressed) file read up to the end of the block.
    """

    first_row: int
    data: bytes
    position: int = 0

    def rows(self) -> Iterator[Row]:
        """Yields the lines that are not blank."""
        for number, line in self.lines():
            yield number, line, functools.partial(parse_line, line)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields the number and the bytes of each line that is not blank.

        Lines over `MAX_LINE_BYTES` are yielded as empty.
        """
        if not self.data:
            yield self.first_row, b""
        for number, line in enumerate(self.data.split(b"\n"), self.first_row):
            if len(line) > MAX_LINE_BYTES:
                yield number, b""
            elif line and not line.isspace():
                yield number, line


def read_blocks(path: epath.PathLike, block_bytes: int) -> Iterator[LinesBlock]:
    """Yields a file of JSON lines, or of a JSON array, in blocks of about `block_bytes`.

    The elements of an array are its lines. Files ending in .gz or .zst are decompressed.

    Raises:
      SourceError: the file cannot be read, is evidently of another format, or damaged.
    """
    last_row = 0
    try:
        start = start_of_file(path, START_BYTES)
        _check_is_json(path, start)
        is_array = ARRAY.match(start.removeprefix(codecs.BOM_UTF8))
        split = split_array if is_array else split_blocks
        with epath.Path(path).open("rb") as stored:
            stream = decompress(path, stored)  # pyright: ignore[reportArgumentType]
            for block in split(stream, block_bytes, stored.tell):
                last_row = block.first_row + block.data.count(b"\n")
                yield block
    except JsonError as error:
        raise SourceError(f"{path}, after element {last_row}: {error}") from None
    except READ_ERRORS as error:
        raise SourceError(f"{path}, after line {last_row}: {error}") from None


def _check_is_json(path: epath.PathLike, start: bytes) -> None:
    """Raises a SourceError if a file that starts like this is of another known format."""
    name = epath.Path(path).name
    quoted = shlex.quote(name)
    if start.startswith(COMPRESSED):
        raise SourceError(f"{path} is compressed: unpack it, or rename it if it is a FILE.jsonl.gz")
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"{\0", b"\0{")):
        raise SourceError(
            f"{path} is not UTF-8: convert it with iconv -f UTF-16 -t UTF-8 {quoted} > FILE.jsonl"
        )
    if has_objects_of_several_lines(start):
        raise SourceError(
            f"{path} has objects of several lines: write one object per line, for example with "
            f"jq -c . {quoted} > FILE.jsonl"
        )


def has_objects_of_several_lines(start: bytes) -> bool:
    """Returns whether a file that starts like this begins with an object of several lines."""
    return re.match(rb'\s*\{\s*?\n\s*"', start.removeprefix(codecs.BOM_UTF8)) is not None


def split_array(
    stream: Any, block_bytes: int, position: Callable[[], int] = lambda: 0
) -> Iterator[LinesBlock]:
    """Yields a JSON array in blocks of elements, each on one line.

    Args:
      stream: the array.
      block_bytes: approximate size of a block.
      position: returns the value for `Block.position`.

    Raises:
      JsonError: the array is not valid JSON.
    """
    document = JsonStream(stream, block_bytes, MAX_LINE_BYTES)
    first_row, lines, size = 1, [], 0
    for text in _elements(document):
        # Line breaks in JSON are only between tokens.
        line = text.encode("utf-8", "surrogateescape").replace(b"\n", b" ")
        lines.append(line)
        size += len(line)
        if size >= block_bytes:
            yield LinesBlock(first_row, b"\n".join([*lines, b""]), position())
            first_row, lines, size = first_row + len(lines), [], 0
    if lines:
        yield LinesBlock(first_row, b"\n".join([*lines, b""]), position())


def _elements(document: JsonStream) -> Iterator[str]:
    """Yields the source text of each element of the array that a document is."""
    document.skip("[")
    if not document.skip("]"):
        yield document.value()[1]
        while document.skip(","):
            yield document.value()[1]
        if not document.skip("]"):
            raise JsonError(f"',' or ']' expected, not {document.peek()!r}")
    if rest := document.peek():
        raise JsonError(f"{rest!r} after the end of the array")


def split_blocks(
    stream: io.IOBase, block_bytes: int, position: Callable[[], int] = lambda: 0
) -> Iterator[LinesBlock]:
    """Yields a stream in blocks of whole lines.

    A line over `MAX_LINE_BYTES` becomes an empty block and is not held in memory.

    Args:
      stream: the lines.
      block_bytes: approximate size of a block.
      position: returns the value for `Block.position`.
    """
    first_row, rest, is_skipping = 1, b"", False
    while chunk := stream.read(block_bytes):
        if is_skipping:
            _, line_break, chunk = chunk.partition(b"\n")
            if not line_break:
                continue
            first_row, is_skipping = first_row + 1, False
        data = rest + chunk
        end = data.rfind(b"\n") + 1
        data, rest = data[:end], data[end:]
        if data:
            yield LinesBlock(first_row, data, position())
            first_row += data.count(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            yield LinesBlock(first_row, b"", position())
            rest, is_skipping = b"", True
    if rest:
        yield LinesBlock(first_row, rest, position())


def parse_line(line: bytes) -> dict[str, Any]:
    """Returns the JSON object of a line.

    Raises:
      RejectedExample: the line is too long (empty, see `Block.lines`) or not a JSON object.
    """
    if not line:
        raise RejectedExample(LINE_TOO_LONG)
    if b"\0" in line:
        raise RejectedExample("NUL character")
    try:
        # Files from Windows often begin with a byte order mark.
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise RejectedExample("invalid UTF-8") from None
    except (ValueError, RecursionError):
        raise RejectedExample(_json_problem(line)) from None
    if not isinstance(value, dict):
        raise RejectedExample("not a JSON object")
    return value


def _json_problem(line: bytes) -> str:
    if line.rstrip().endswith(b"},"):
        return "broken JSON: a comma after the object"
    if re.search(rb"\}\s*\r\s*\{", line):
        return r"broken JSON: lines end with \r instead of \n"
    return "broken JSON"


def is_held_out(line: bytes, fraction: float, seed: int) -> bool:
    """Returns whether a line belongs to the held-out fraction, by a keyed hash of its bytes.

    Copies of a line therefore go to the same split, and adding a line moves no other line.
    """
    key = seed.to_bytes(8, "little", signed=True)
    digest = hashlib.blake2b(line.strip(), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64
