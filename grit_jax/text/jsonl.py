"""JSONL files: one process reads them in blocks of numbered lines, and many parse the lines."""

import codecs
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
import shlex
from typing import Any
import zlib

from etils import epath

from grit_jax.text.examples import RejectedExample
from grit_jax.text.formats import Preprocess
from grit_jax.text.kinds import TEXT_KINDS, kind_of_line

SUFFIXES = (".jsonl", ".jsonl.gz")
MEGABYTE = 2**20
# A file with longer lines is probably not a JSONL file.
MAX_LINE_BYTES = 16 * MEGABYTE
LINE_TOO_LONG = f"line over {MAX_LINE_BYTES // MEGABYTE} MB"

# Read from a file to recognize other formats.
START_BYTES = 4096
# Suffixes of tables, and the function of pandas that reads them.
TABLES = {
    ".parquet": "read_parquet",
    ".csv": "read_csv",
    ".tsv": "read_table",
    ".arrow": "read_feather",
    ".xlsx": "read_excel",
}
# First bytes of files compressed by gzip, zip, zstd, bzip2 and xz.
COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")

# Said of files without a line.
EMPTY = " (empty)"

# A file or folder, or several.
Paths = epath.PathLike | Sequence[epath.PathLike]


class SourceError(ValueError):
    """A source of data is missing, unreadable or wrongly declared; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Whole lines of a file.

    Attributes:
      first_line: number of the first line, counted from 1.
      data: the lines; empty if the block is one line over `MAX_LINE_BYTES`.
      position: bytes of the stored (maybe compressed) file read up to the end of the block.
    """

    first_line: int
    data: bytes
    position: int = 0

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields the number and the bytes of each line that is not blank.

        Lines over `MAX_LINE_BYTES` are yielded as empty.
        """
        if not self.data:
            yield self.first_line, b""
        for number, line in enumerate(self.data.split(b"\n"), self.first_line):
            if len(line) > MAX_LINE_BYTES:
                yield number, b""
            elif line and not line.isspace():
                yield number, line


def read_blocks(path: epath.PathLike, block_bytes: int) -> Iterator[Block]:
    """Yields a .jsonl or .jsonl.gz file in blocks of about `block_bytes`.

    Raises:
      SourceError: the file cannot be read, is evidently of another format, or a compressed file is
        damaged.
    """
    last_line = 0
    try:
        with epath.Path(path).open("rb") as stored:
            compressed = str(path).endswith(".gz")
            stream: Any = gzip.GzipFile(fileobj=stored) if compressed else stored
            _check_is_jsonl(path, stream.read(START_BYTES))
            stream.seek(0)
            for block in split_blocks(stream, block_bytes, stored.tell):
                last_line = block.first_line + block.data.count(b"\n")
                yield block
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path}, after line {last_line}: {error}") from None


def _check_is_jsonl(path: epath.PathLike, start: bytes) -> None:
    """Raises a SourceError if a file that starts like this is of another known format."""
    name = epath.Path(path).name
    quoted = shlex.quote(name)
    for suffix, function in TABLES.items():
        if name.endswith(suffix) or (suffix == ".parquet" and start.startswith(b"PAR1")):
            raise SourceError(
                f"{path} is a table, not JSON lines: convert it, for example with "
                f"pandas.{function}({name!r}).to_json('FILE.jsonl', orient='records', lines=True)"
            )
    if start.startswith(COMPRESSED):
        raise SourceError(f"{path} is compressed: unpack it, or compress it as FILE.jsonl.gz")
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"{\0", b"\0{")):
        raise SourceError(
            f"{path} is not UTF-8: convert it with iconv -f UTF-16 -t UTF-8 {quoted} > FILE.jsonl"
        )
    start = start.removeprefix(codecs.BOM_UTF8)
    if re.match(rb"\s*\[\s*(\{|$)", start):
        raise SourceError(
            f"{path} is a JSON array: write one object per line, for example with "
            f"jq -c '.[]' {quoted} > FILE.jsonl"
        )
    if re.match(rb'\s*\{\s*?\n\s*"', start):
        raise SourceError(
            f"{path} has objects of several lines: write one object per line, for example with "
            f"jq -c . {quoted} > FILE.jsonl"
        )


def split_blocks(
    stream: io.IOBase, block_bytes: int, position: Callable[[], int] = lambda: 0
) -> Iterator[Block]:
    """Yields a stream in blocks of whole lines.

    A line over `MAX_LINE_BYTES` becomes an empty block and is not held in memory.

    Args:
      stream: the lines.
      block_bytes: approximate size of a block.
      position: returns the value for `Block.position`.
    """
    first_line, rest, is_skipping = 1, b"", False
    while chunk := stream.read(block_bytes):
        if is_skipping:
            _, line_break, chunk = chunk.partition(b"\n")
            if not line_break:
                continue
            first_line, is_skipping = first_line + 1, False
        data = rest + chunk
        end = data.rfind(b"\n") + 1
        data, rest = data[:end], data[end:]
        if data:
            yield Block(first_line, data, position())
            first_line += data.count(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            yield Block(first_line, b"", position())
            rest, is_skipping = b"", True
    if rest:
        yield Block(first_line, rest, position())


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


@dataclasses.dataclass(frozen=True)
class JsonlFiles:
    """The JSONL files of a dataset.

    Attributes:
      files: the files of each split, in order.
      preprocess: function on the object of each line, or None.
      held_out: fraction of the lines of "train" that forms the split "held_out".
      seed: seed for choosing these lines.
    """

    files: Mapping[str, tuple[epath.Path, ...]]
    preprocess: Preprocess | None = None
    held_out: float = 0.0
    seed: int = 0

    @classmethod
    def find(
        cls,
        files: Paths | Mapping[str, Paths],
        preprocess: Preprocess | None = None,
        held_out: float = 0.0,
        seed: int = 0,
    ) -> "JsonlFiles":
        """Returns the JSONL files in files and folders.

        Args:
          files: for each split a file or folder, or several; without splits, those of "train".
          preprocess: function from a line's object to one in an accepted format, or to None to
            skip the line.
          held_out: fraction of the lines of "train" that forms the split "held_out".
          seed: seed for choosing these lines.

        Raises:
          SourceError: a file or folder does not exist, or `held_out` is not a valid fraction.
        """
        by_split = files if isinstance(files, Mapping) else {"train": files}
        if held_out and "held_out" in by_split:
            raise SourceError("held_out: give a fraction of 'train' or files of its own, not both")
        if not 0 <= held_out < 1:
            raise SourceError(f"held_out={held_out}: give a fraction from 0 to below 1")
        found = {
            split: tuple(
                file
                for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)
                for file in find_files(path)
            )
            for split, paths in by_split.items()
        }
        return cls(found, preprocess, held_out, seed)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of all splits."""
        return (*self.files, "held_out") if self.held_out else tuple(self.files)

    def split_of(self, split: str, line: bytes) -> str:
        """Returns the split of a line in a file of `split`."""
        if split != "train" or not self.held_out:
            return split
        return "held_out" if is_held_out(line, self.held_out, self.seed) else split


def find_files(path: epath.PathLike) -> list[epath.Path]:
    """Returns the JSONL files of a folder and its subfolders, or `path` itself if it is a file.

    Raises:
      SourceError: there are none.
    """
    path = epath.Path(path)
    if path.is_file():
        return [path]
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    all_files = list(files_below(path))
    files = [file for file in all_files if file.name.endswith(SUFFIXES)]
    if not files:
        other = f", only {all_files[0].relative_to(path)}" if all_files else ""
        raise SourceError(
            f"{path} has no {' or '.join(SUFFIXES)} file{other}: write one JSON object per line"
        )
    return files


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields the files of a folder and its subfolders in order, without hidden ones."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from files_below(path)
        else:
            yield path


def kind_of_files(files: Iterable[epath.PathLike], preprocess: Preprocess | None) -> str:
    """Returns the name of the kind of the first example in these files.

    Raises:
      SourceError: no line is an example.
    """
    files = list(files)
    first = EMPTY
    for file in files:
        for block in read_blocks(file, MEGABYTE):
            for number, line in block.lines():
                kind, reason = _kind_of_line(line, preprocess)
                if kind is not None:
                    return kind
                if first == EMPTY:
                    first = f" (line {number}: {reason})"
    formats = [form for kind in TEXT_KINDS.values() for form in kind.line_formats]
    raise SourceError(
        f"{', '.join(map(str, files))}: no line is an example{first}; a line is one of "
        f"{', '.join(formats)}"
    )


def _kind_of_line(line: bytes, preprocess: Preprocess | None) -> tuple[str | None, str]:
    """Returns the kind of a line's example, or None and the reason."""
    try:
        raw = parse_line(line)
        raw = raw if preprocess is None else preprocess(raw)
    except Exception as error:  # Preparing reports errors of single lines.
        return None, str(error)
    if raw is None:
        return None, "left out"
    return kind_of_line(raw), f"it has {', '.join(map(repr, raw)) or 'nothing'}"[:200]
