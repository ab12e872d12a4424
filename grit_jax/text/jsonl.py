"""Files of lines, in blocks: read in one process, parsed in many; each line keeps its number."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import gzip
import hashlib
import json
from typing import Any, BinaryIO
import zlib

from etils import epath

from grit_jax.text.examples import RejectedExample
from grit_jax.text.formats import Preprocess
from grit_jax.text.kinds import TEXT_KINDS, kind_of_line

SUFFIXES = (".jsonl", ".jsonl.gz")
MEGABYTE = 2**20
# A longer line is not an example, but a file that is not what its name says.
MAX_LINE_BYTES = 16 * MEGABYTE
LINE_TOO_LONG = f"line over {MAX_LINE_BYTES // MEGABYTE} MB"


class SourceError(ValueError):
    """A dataset's files are missing or unreadable; the message names them and what to do."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Whole lines of a file.

    Attributes:
      first_line: number of the first, counted from 1.
      data: the lines; nothing where the only line is too long to be kept.
      position: bytes of the stored file that have been read up to here.
    """

    first_line: int
    data: bytes
    position: int = 0

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields each line that is not blank, with its number.

        A line that is too long is empty.
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
      SourceError: a compressed file is damaged, or the file cannot be read.
    """
    last_line = 0
    try:
        with epath.Path(path).open("rb") as stored:
            compressed = str(path).endswith(".gz")
            stream: Any = gzip.GzipFile(fileobj=stored) if compressed else stored
            for block in split_blocks(stream, block_bytes, stored.tell):
                last_line = block.first_line + block.data.count(b"\n")
                yield block
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path}, after line {last_line}: {error}") from None


def split_blocks(
    stream: BinaryIO, block_bytes: int, position: Callable[[], int] = lambda: 0
) -> Iterator[Block]:
    """Yields blocks of whole lines; of a line that is too long, only where it was."""
    first_line, rest, is_skipping = 1, b"", False
    while chunk := stream.read(block_bytes):
        if is_skipping:
            _, line_break, chunk = chunk.partition(b"\n")
            if not line_break:
                continue
            first_line, is_skipping = first_line + 1, False
        data = rest + chunk
        whole = data.rfind(b"\n") + 1
        data, rest = data[:whole], data[whole:]
        if data:
            yield Block(first_line, data, position())
            first_line += data.count(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            yield Block(first_line, b"", position())
            rest, is_skipping = b"", True
    if rest:
        yield Block(first_line, rest, position())


def parse_line(line: bytes) -> dict[str, Any]:
    """Returns the object of a line.

    Raises:
      RejectedExample: it is too long (empty, see `Block.lines`), or no JSON object.
    """
    if not line:
        raise RejectedExample(LINE_TOO_LONG)
    if b"\0" in line:
        raise RejectedExample("NUL character")
    try:
        # A byte order mark begins many a file that comes from Windows.
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise RejectedExample("invalid UTF-8") from None
    except (ValueError, RecursionError):
        raise RejectedExample("broken JSON") from None
    if not isinstance(value, dict):
        raise RejectedExample("not a JSON object")
    return value


def is_held_out(line: bytes, fraction: float, seed: int) -> bool:
    """Says whether a line belongs to the held-out fraction: a keyed hash of its bytes decides.

    So copies of a line are on one side, wherever they stand, and a line that is added to the file
    changes nothing for the others.
    """
    key = seed.to_bytes(8, "little", signed=True)
    digest = hashlib.blake2b(line.strip(), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


@dataclasses.dataclass(frozen=True)
class JsonlFiles:
    """A dataset in files of lines.

    Attributes:
      files: those of each split, in their order.
      preprocess: a function on each line's object, or None.
      held_out: fraction of the lines of "train" that make the split "held_out".
      seed: of the choice of these lines.
    """

    files: Mapping[str, tuple[epath.Path, ...]]
    preprocess: Preprocess | None = None
    held_out: float = 0.0
    seed: int = 0

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
    """Returns the .jsonl and .jsonl.gz files of a folder and its subfolders, or the file itself.

    Raises:
      SourceError: there are none.
    """
    path = epath.Path(path)
    if path.is_file():
        return [path]
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    files = [file for file in _files_below(path) if file.name.endswith(SUFFIXES)]
    if not files:
        raise SourceError(f"{path}: no {' or '.join(SUFFIXES)} file in it")
    return files


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_below(path)
        else:
            yield path


def kind_of_files(files: Iterable[epath.Path], preprocess: Preprocess | None) -> str:
    """Returns the kind of the first example in these files, "embedding" or "generative".

    Raises:
      SourceError: no line is an example.
    """
    files = list(files)
    first = ""
    for file in files:
        for block in read_blocks(file, MEGABYTE):
            for number, line in block.lines():
                kind, reason = _kind_of_line(line, preprocess)
                if kind is not None:
                    return kind
                first = first or f" (line {number}: {reason})"
    raise SourceError(
        f"{', '.join(map(str, files))}: not one line is an example{first}; a line is one of "
        + ", ".join(form for kind in TEXT_KINDS.values() for form in kind.line_formats)
    )


def _kind_of_line(line: bytes, preprocess: Preprocess | None) -> tuple[str | None, str]:
    """Returns the kind of a line's example, or None and what is wrong with the line."""
    try:
        raw = parse_line(line)
        raw = raw if preprocess is None else preprocess(raw)
    except Exception as error:  # Of a single line it is reported when it is prepared.
        return None, str(error)
    if raw is None:
        return None, "left out"
    return kind_of_line(raw), f"it has {', '.join(map(repr, raw)) or 'nothing'}"[:200]
