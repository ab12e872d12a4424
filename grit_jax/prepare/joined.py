"""Datasets whose queries name their passages by ID: BEIR's folders, and Nemotron's.

    FOLDER/corpus.jsonl  queries.jsonl  qrels/train.tsv                  BEIR
    FILE.json: {"corpus": {"path": FOLDER}, "data": [{"question", "pos_doc", "neg_doc"}, ...]}
    FOLDER/dataset_metadata.json, and Parquet files of queries and of the corpus

The texts of the passages that are named are in a temporary file that is mapped into memory, and
are looked up block by block.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import hashlib
import mmap
import re
import tempfile
from typing import Any

from etils import epath
from jaxtyping import UInt64
import numpy as np

from grit_jax.prepare.data_file import DataFile, is_data_file, read_json, stem_of_name
from grit_jax.prepare.tables import RowsBlock
from grit_jax.text.compression import READ_ERRORS, decompress, start_of_file
from grit_jax.text.examples import RejectedExample
from grit_jax.text.json_stream import JsonError, JsonStream
from grit_jax.text.jsonl import MAX_LINE_BYTES, MEGABYTE, START_BYTES, SourceError

# Describe a corpus of Nemotron, and a dataset with its corpus.
CORPUS_METADATA, DATASET_METADATA = "merlin_metadata.json", "dataset_metadata.json"
# The start of a Nemotron file of queries.
NEMOTRON = re.compile(rb'\s*\{\s*"(corpus|data)"\s*:')
# Instructions of Nemotron are "Instruct: TASK\nQuery:".
INSTRUCTION = re.compile(r"Instruct:\s*(.*?)\s*\n\s*Query:\s*", re.DOTALL)

# A query with the IDs of its positives and negatives.
Query = tuple[str, list[str], list[str]]


class Corpus:
    """The texts of some documents, in a temporary file that is mapped into memory.

    Args:
      documents: the ID and text of every document.
      wanted: the IDs of the documents to keep.

    Raises:
      SourceError: two documents have the same ID.
    """

    def __init__(self, documents: Iterable[tuple[str, str]], wanted: Iterable[str]):
        self._keys = np.unique(np.fromiter(map(_key, wanted), np.uint64))
        self._starts = np.full(len(self._keys), -1, np.int64)
        self._ends = np.zeros(len(self._keys), np.int64)
        with tempfile.TemporaryFile() as file:
            position = 0
            for document_id, text in documents:
                index = self._index(document_id)
                if index is None:
                    continue
                if self._starts[index] >= 0:
                    raise SourceError(f"two documents of the corpus have the ID {document_id!r}")
                self._starts[index] = position
                position += file.write(text.encode("utf-8", "surrogatepass"))
                self._ends[index] = position
            file.flush()
            # The file has no name: it is gone with the last map of it.
            self._texts = mmap.mmap(file.fileno(), 0) if position else b""

    def __getitem__(self, document_id: str) -> str:
        """Returns the text of a document.

        Raises:
          RejectedExample: the corpus has no such document.
        """
        index = self._index(document_id)
        if index is None or self._starts[index] < 0:
            raise RejectedExample("a document that the corpus does not have")
        content = self._texts[self._starts[index] : self._ends[index]]
        return bytes(content).decode("utf-8", "surrogatepass")

    def _index(self, document_id: str) -> int | None:
        key = _key(document_id)
        index = int(np.searchsorted(self._keys, key))
        return index if index < len(self._keys) and self._keys[index] == key else None


def _key(document_id: str) -> UInt64[np.ndarray, ""] | np.uint64:
    digest = hashlib.blake2b(document_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.frombuffer(digest, np.uint64)[0]


@dataclasses.dataclass(frozen=True)
class JoinedFile(DataFile):
    """Queries that name their passages by ID.

    Attributes:
      path: the file that pairs queries and documents.
      corpus: the files of the corpus.
    """

    corpus: tuple[DataFile, ...]

    @property
    def size(self) -> int:
        """Stored bytes of all files."""
        return sum(part.size for part in self._parts())

    @property
    def paths(self) -> set[epath.Path]:
        """The paths of all files."""
        return {part.path for part in self._parts()}

    def describe(self) -> list[dict[str, Any]]:
        """Returns name, size and SHA-256 of all files."""
        return [file for part in self._parts() for file in part.describe()]

    def read(self, block_bytes: int) -> Iterator[RowsBlock]:
        """Yields blocks of rows with the texts of their passages."""
        wanted = (
            name for _, positives, negatives in self._queries() for name in (*positives, *negatives)
        )
        try:
            corpus = Corpus(_documents(self.corpus), wanted)
        except SourceError as error:
            raise SourceError(f"{self.path}: {error}") from None
        query_prompt, passage_prompt = self._instructions()
        first_row, rows, size = 1, [], 0
        for query, positives, negatives in self._queries():
            try:
                texts = [
                    [[passage_prompt, corpus[name]] for name in names]
                    for names in (positives, negatives)
                ]
            except RejectedExample as reason:
                rows.append(str(reason))
            else:
                rows.append({"query": [query_prompt, query], "pos": texts[0], "neg": texts[1]})
                size += len(query) + sum(len(text) for pair in texts for _, text in pair)
            if size >= block_bytes:
                yield RowsBlock(first_row, rows)
                first_row, rows, size = first_row + len(rows), [], 0
        if rows:
            yield RowsBlock(first_row, rows)

    def _parts(self) -> tuple[DataFile, ...]:
        return (DataFile(self.path), *self.corpus)

    def _queries(self) -> Iterator[Query]:
        raise NotImplementedError

    def _instructions(self) -> tuple[str, str]:
        """Returns the instructions of queries and passages."""
        return "", ""


def _documents(files: Iterable[DataFile]) -> Iterator[tuple[str, str]]:
    """Yields the ID of each document, and its title and text."""
    for file in files:
        for number, row in _rows(file):
            document_id, text = row.get("_id", row.get("id")), row.get("text")
            if document_id is None or not isinstance(text, str):
                raise SourceError(f"{file}, row {number}: a document has no ID or no text")
            yield str(document_id), f"{row.get('title') or ''} {text}".strip()


def _rows(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    for block in file.read(MEGABYTE):
        for number, _, parse in block.rows():
            try:
                yield number, parse()
            except RejectedExample as reason:
                raise SourceError(f"{file}, row {number}: {reason}") from None


@dataclasses.dataclass(frozen=True)
class BeirFile(JoinedFile):
    """Judgments of BEIR. Documents with a score of 0 are negatives."""

    queries: DataFile

    def _parts(self) -> tuple[DataFile, ...]:
        return (*super()._parts(), self.queries)

    def _queries(self) -> Iterator[Query]:
        judged: dict[str, tuple[list[str], list[str]]] = {}
        for number, row in _rows(DataFile(self.path)):
            try:
                query, document = row["query-id"], row["corpus-id"]
                is_positive = float(row["score"]) > 0
            except (KeyError, TypeError, ValueError):
                raise SourceError(
                    f"{self.path}, row {number}: not a line of query-id, corpus-id and score"
                ) from None
            judged.setdefault(query, ([], []))[0 if is_positive else 1].append(document)
        texts = {}
        for number, row in _rows(self.queries):
            if (query := str(row.get("_id", row.get("id")))) in judged:
                if not isinstance(row.get("text"), str):
                    raise SourceError(f"{self.queries}, row {number}: a query has no text")
                texts[query] = row["text"]
        for query, (positives, negatives) in judged.items():
            if query not in texts:
                raise SourceError(f"{self.queries} has no query {query!r} of {self.path}")
            yield texts[query], positives, negatives


@dataclasses.dataclass(frozen=True)
class NemotronFile(JoinedFile):
    """Queries of Nemotron, in Parquet files or a JSON file."""

    queries: tuple[DataFile, ...]
    metadata: tuple[epath.Path, ...]

    def _parts(self) -> tuple[DataFile, ...]:
        return (*self.queries, *self.corpus, *map(DataFile, self.metadata))

    def _instructions(self) -> tuple[str, str]:
        fields = [read_json(path) for path in self.metadata]
        found = [
            {each.get(name) or "" for each in fields}
            for name in ("query_instruction", "passage_instruction")
        ]
        if any(len(texts) > 1 for texts in found):
            raise SourceError(f"{self.path}: its corpora have different instructions: split it")
        query, passage = (next(iter(texts), "") for texts in found)
        return INSTRUCTION.sub(r"\1", query), INSTRUCTION.sub(r"\1", passage)

    def _queries(self) -> Iterator[Query]:
        for file in self.queries:
            rows = _nemotron_rows(file) if ".json" in file.name else _rows(file)
            for number, row in rows:
                query = row.get("question")
                if not isinstance(query, str) or row.get("pos_doc") is None:
                    raise SourceError(f"{file}, row {number}: no 'question' or no 'pos_doc'")
                yield query, _ids(row["pos_doc"]), _ids(row.get("neg_doc"))


def _ids(documents: Any) -> list[str]:
    """Returns IDs from `[{"id": ...}, ...]`, `[ID, ...]` or one of them."""
    listed = documents if isinstance(documents, list) else [documents]
    ids = [each.get("id") if isinstance(each, Mapping) else each for each in listed]
    return [str(each) for each in ids if each is not None]


def _nemotron_rows(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the elements of "data" in a file of one JSON object."""
    try:
        with file.path.open("rb") as stored:
            stream = decompress(file.path, stored)  # pyright: ignore[reportArgumentType]
            document = JsonStream(stream, MEGABYTE, MAX_LINE_BYTES)
            for name in _names(document):
                if name != "data" or not document.skip("["):
                    document.value()
                    continue
                number = 0
                while not document.skip("]"):
                    number += 1
                    yield number, document.value()[0]
                    document.skip(",")
    except (JsonError, *READ_ERRORS) as error:
        raise SourceError(f"{file}: {error}") from None


def _names(document: JsonStream) -> Iterator[str]:
    """Yields the names of an object; the caller reads the value of each."""
    document.skip("{")
    while not document.skip("}"):
        name, _ = document.value()
        if not document.skip(":"):
            raise JsonError(f"':' expected, not {document.peek()!r}")
        yield name
        document.skip(",")


def find_joined(
    folder: epath.Path, entries: Mapping[str, epath.Path]
) -> tuple[JoinedFile, list[epath.Path]] | None:
    """Returns the dataset that a folder is, and the files in it that are not read.

    Args:
      folder: the folder.
      entries: its files and folders by name.

    Returns:
      None if the folder is not a dataset of BEIR, or of Nemotron in Parquet files.

    Raises:
      SourceError: a file of the dataset is missing.
    """
    files = {
        stem_of_name(name): path
        for name, path in entries.items()
        if path.is_file() and is_data_file(path)
    }
    if {"corpus", "queries"} <= files.keys():
        found = _find_beir(folder, files)
    elif DATASET_METADATA in entries:
        found = _find_nemotron(folder, entries[DATASET_METADATA])
    else:
        return None
    read = found.paths
    return found, [path for path in files_below(folder) if path not in read]


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields the files of a folder and its subfolders in order, without hidden ones."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from files_below(path)
        else:
            yield path


def _find_beir(folder: epath.Path, files: Mapping[str, epath.Path]) -> BeirFile:
    qrels = folder / "qrels"
    train = qrels / "train.tsv"
    if not train.exists():
        others = [path.name for path in sorted(qrels.iterdir())] if qrels.exists() else []
        only = f" (only {', '.join(others)})" if others else ""
        raise SourceError(
            f"{folder} is a BEIR dataset without qrels/train.tsv{only}: only these judgments are "
            "for training; to train on others, give them that name"
        )
    return BeirFile(train, (DataFile(files["corpus"]),), DataFile(files["queries"]))


def is_nemotron_file(path: epath.Path) -> bool:
    """Returns whether a file is a JSON file of Nemotron's queries."""
    if stem_of_name(path.name) == path.name or ".json" not in path.name:
        return False
    return NEMOTRON.match(start_of_file(path, START_BYTES)) is not None


def nemotron_file(path: epath.Path) -> NemotronFile:
    """Returns a JSON file of Nemotron's queries, with the corpora that it names.

    Raises:
      SourceError: the file is damaged, or a corpus is missing.
    """
    try:
        with path.open("rb") as stored:
            document = JsonStream(stored, START_BYTES, MAX_LINE_BYTES)
            # The corpora are named first. Values before them are small.
            name = next(_names(document), None)
            corpora: Any = document.value()[0] if name == "corpus" else None
    except JsonError as error:
        raise SourceError(f"{path}: {error}") from None
    listed = corpora if isinstance(corpora, list) else [corpora]
    if not all(isinstance(each, Mapping) and "path" in each for each in listed):
        raise SourceError(f'{path} does not begin with {{"corpus": {{"path": FOLDER}}, ...')
    folders = [path.parent / each["path"] for each in listed]
    for each in folders:
        if not (each / CORPUS_METADATA).exists():
            raise SourceError(f"{path}: its corpus {each} has no {CORPUS_METADATA}")
    corpus = [file for each in folders for file in _parquet_files(each)]
    metadata = tuple(each / CORPUS_METADATA for each in folders)
    return NemotronFile(path, tuple(corpus), (DataFile(path),), metadata)


def _find_nemotron(folder: epath.Path, metadata: epath.Path) -> NemotronFile:
    if read_json(metadata).get("ids_only"):
        raise SourceError(
            f"{folder} has the IDs of its documents only (ids_only): get their texts from the "
            "dataset that its README names"
        )
    queries, corpus = [], []
    for file in _parquet_files(folder):
        columns = next((row.keys() for _, row in _rows(file)), ())
        if "question" in columns:
            queries.append(file)
        elif "text" in columns:
            corpus.append(file)
    if not queries or not corpus:
        raise SourceError(
            f"{folder}: no Parquet files of queries (question, pos_doc) or of a corpus (id, text)"
        )
    return NemotronFile(folder, tuple(corpus), tuple(queries), (metadata,))


def _parquet_files(folder: epath.Path) -> list[DataFile]:
    return [DataFile(path) for path in files_below(folder) if path.name.endswith(".parquet")]
