"""Reads tables: CSV and TSV, Parquet and Arrow files, in blocks of rows."""

from collections.abc import Iterable, Iterator, Sequence
import csv
import dataclasses
import io
import json
from typing import Any

from etils import epath

from grit_jax.text.compression import (
    READ_ERRORS,
    decompress,
    start_of_file,
    without_compression_suffix,
)
from grit_jax.text.examples import RejectedExample
from grit_jax.text.jsonl import MAX_LINE_BYTES, MEGABYTE, Block, Row, SourceError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
ARROW_SUFFIXES = (".parquet", ".arrow", ".feather")
# The start of Parquet files, and of Arrow files that are not streams.
PARQUET_START, ARROW_START = b"PAR1", b"ARROW1"
ROW_TOO_LONG = f"row over {MAX_LINE_BYTES // MEGABYTE} MB"


@dataclasses.dataclass(frozen=True)
class RowsBlock(Block):
    """Rows as dictionaries, or the reason why a row is unusable."""

    first_row: int
    content: Sequence[dict[str, Any] | str]
    position: int = 0

    def rows(self) -> Iterator[Row]:
        """Yields the rows."""
        for number, row in enumerate(self.content, self.first_row):
            yield _row(number, row)


@dataclasses.dataclass(frozen=True)
class RecordsBlock(Block):
    """Records of a CSV file."""

    first_row: int
    columns: tuple[str, ...]
    records: list[list[str]]
    position: int = 0

    def rows(self) -> Iterator[Row]:
        """Yields the rows; empty fields are None."""
        for number, record in enumerate(self.records, self.first_row):
            if not record:
                continue  # A blank line.
            if len(record) != len(self.columns):
                yield _row(number, f"{len(record)} fields, not {len(self.columns)}")
                continue
            values = [value or None for value in record]
            yield _row(number, dict(zip(self.columns, values, strict=True)))


@dataclasses.dataclass(frozen=True)
class ArrowBlock(Block):
    """Rows as an Arrow stream."""

    first_row: int
    data: bytes
    position: int = 0

    def rows(self) -> Iterator[Row]:
        """Yields the rows."""
        import pyarrow

        number = self.first_row
        with pyarrow.ipc.open_stream(self.data) as batches:
            for batch in batches:
                for row in batch.to_pylist():
                    yield _row(number, row)
                    number += 1


def _row(number: int, row: dict[str, Any] | str) -> Row:
    """Returns a row; a string is the reason why it is unusable."""
    if isinstance(row, str):
        return number, row.encode(), lambda: _reject(row)
    content = json.dumps(row, sort_keys=True, default=str).encode()
    if len(content) > MAX_LINE_BYTES:
        return number, content, lambda: _reject(ROW_TOO_LONG)
    return number, content, lambda: row


def _reject(reason: str) -> dict[str, Any]:
    raise RejectedExample(reason)


def is_arrow(path: epath.PathLike) -> bool:
    """Returns whether a file is a Parquet or Arrow file, by its name or its first bytes."""
    if str(path).endswith(ARROW_SUFFIXES):
        return True
    return start_of_file(path, len(ARROW_START)).startswith((PARQUET_START, ARROW_START))


def read_arrow(path: epath.PathLike, block_bytes: int) -> Iterator[ArrowBlock]:
    """Yields a Parquet or Arrow file in blocks of about `block_bytes` of memory.

    Only a block is in memory, not a whole row group.

    Raises:
      SourceError: the file cannot be read or is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    size, last_row = epath.Path(path).stat().length, 0
    try:
        start = start_of_file(path, len(ARROW_START))
        with epath.Path(path).open("rb") as stored:
            if start.startswith(PARQUET_START):
                file = pyarrow.parquet.ParquetFile(stored)
                batches, num_rows = _parquet_batches(file, block_bytes), file.metadata.num_rows
            elif start == ARROW_START:
                file = pyarrow.ipc.open_file(stored)
                batches, num_rows = map(file.get_batch, range(file.num_record_batches)), None
            else:
                batches, num_rows = pyarrow.ipc.open_stream(stored), None
            for group in _groups(batches, block_bytes):
                first_row, last_row = last_row + 1, last_row + sum(map(len, group))
                position = size * last_row // num_rows if num_rows else stored.tell()
                yield ArrowBlock(first_row, _to_bytes(group), position)
    except (*READ_ERRORS, pyarrow.ArrowException) as error:
        message = " ".join(str(error).split())
        raise SourceError(f"{path}, after row {last_row}: {message}") from None


def _parquet_batches(file: Any, block_bytes: int) -> Iterator[Any]:
    groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
    num_bytes = sum(group.total_byte_size for group in groups)
    batch_size = max(1, block_bytes * file.metadata.num_rows // max(1, num_bytes))
    return file.iter_batches(batch_size=batch_size)


def _groups(batches: Iterable[Any], block_bytes: int) -> Iterator[list[Any]]:
    """Yields lists of record batches of about `block_bytes`; larger batches are sliced."""
    group, size = [], 0
    for batch in batches:
        rows = max(1, len(batch) * block_bytes // max(1, batch.nbytes))
        for first in range(0, len(batch), rows):
            part = batch.slice(first, rows)
            group.append(part)
            size += part.nbytes
            if size >= block_bytes:
                yield group
                group, size = [], 0
    if group:
        yield group


def _to_bytes(batches: Sequence[Any]) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def read_csv(path: epath.PathLike, block_bytes: int) -> Iterator[RecordsBlock]:
    """Yields a CSV or TSV file, maybe compressed, in blocks of about `block_bytes`.

    The first record has the names of the columns. Row 1 is the second.

    Raises:
      SourceError: the file cannot be read, or is not valid CSV.
    """
    suffix = next(
        suffix for suffix in DELIMITERS if without_compression_suffix(str(path)).endswith(suffix)
    )
    csv.field_size_limit(MAX_LINE_BYTES)
    reader: Any = None
    try:
        with epath.Path(path).open("rb") as stored:
            text = io.TextIOWrapper(
                decompress(path, stored),  # pyright: ignore[reportArgumentType]
                encoding="utf-8-sig",
                errors="surrogateescape",
                newline="",
            )
            reader = csv.reader(text, delimiter=DELIMITERS[suffix], strict=True)
            columns = tuple(next(reader, ()))
            _check_columns(path, columns)
            first_row, records, size = 1, [], 0
            for record in reader:
                records.append(record)
                size += sum(map(len, record))
                if size >= block_bytes:
                    yield RecordsBlock(first_row, columns, records, stored.tell())
                    first_row, records, size = first_row + len(records), [], 0
            if records:
                yield RecordsBlock(first_row, columns, records, stored.tell())
    except (*READ_ERRORS, csv.Error) as error:
        line = reader.line_num if reader else 0
        raise SourceError(
            f"{path}, line {line}: {error}; quotes within a field must be doubled"
            if isinstance(error, csv.Error)
            else f"{path}, after line {line}: {error}"
        ) from None


def _check_columns(path: epath.PathLike, columns: Sequence[str]) -> None:
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise SourceError(f"{path}: its first line names the column {twice[0]!r} twice")
