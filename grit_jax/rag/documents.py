"""Reads documents from text files, JSONL files or TensorFlow Datasets."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grit_jax.files import json_sha256
from grit_jax.inference.prompt_encoder import InputError, check_unicode, title_and_text
from grit_jax.text.examples import RejectedExample
from grit_jax.text.jsonl import MEGABYTE, SourceError, parse_line, read_blocks

JSONL_SUFFIXES, TEXT_SUFFIXES = (".jsonl", ".jsonl.gz"), (".txt", ".md")
TFDS = "tfds:"

# Fields that identify a document; the first that it has counts. BEIR's corpora have "_id".
ID_FIELDS = ("id", "_id")

# A document: "text", optionally "title" and an ID, and any other fields of JSON values.
Document = dict[str, Any]
# Is called with the reason why a document is left out.
Reject = Callable[[str], None]


def read_documents(source: str, reject: Reject | None = None) -> Iterator[Document]:
    """Returns an iterator over the documents of a source.

    Args:
      source: a folder with .jsonl, .jsonl.gz, .txt and .md files, or one such file; or a dataset of
        TensorFlow Datasets with the feature "text", as "tfds:NAME" or "tfds:NAME/SPLIT", where NAME
        may include a configuration. A line of a JSONL file is an object with "text" and optionally
        "title", "id" and other fields; a text file is one document, whose ID is its path.
      reject: leaves out documents without text and unreadable files, and is called with a line
        about each. By default they raise an error.

    Raises:
      InputError: the source does not exist or has no documents (raised at once), or a document has
        no text or a file is damaged (raised by the iterator). The message names file and line.
    """
    return _without_errors(_documents_or_errors(source), reject)


def _documents_or_errors(source: str) -> Iterator[Document | InputError]:
    if source.startswith(TFDS):
        return _read_tfds(source.removeprefix(TFDS))
    path = Path(source)
    if not path.exists():
        raise InputError(f"{source} does not exist: give a folder, a .jsonl file, or tfds:NAME")
    suffixes = JSONL_SUFFIXES + TEXT_SUFFIXES
    files = _visible_files(path) if path.is_dir() else [path]
    files = [file for file in files if file.name.endswith(suffixes) and file.is_file()]
    if not files:
        raise InputError(f"{source} has no {', '.join(suffixes)} files: give another folder")
    return _read_files(files)


def _without_errors(
    documents: Iterator[Document | InputError], reject: Reject | None
) -> Iterator[Document]:
    for document in documents:
        if not isinstance(document, InputError):
            yield document
        elif reject is None:
            raise document
        else:
            reject(str(document))


def document_id(document: Mapping[str, Any], name: str = "a document") -> str:
    """Returns the ID of a document as a string; without one, a hash of its title and text.

    Raises:
      InputError: the document has no text, or an invalid ID; the message begins with `name`.
    """
    own_id = _own_id(document, name)
    return text_hash(document, name) if own_id is None else own_id


def document_name(number: int, document: Any) -> str:
    """Returns a name of a document for messages: its number and, if it has one, its ID."""
    fields = document if isinstance(document, Mapping) else {}
    ids = [f" (ID {fields[field]!r})" for field in ID_FIELDS if fields.get(field) is not None]
    return f"document {number}{''.join(ids[:1])}"


def text_hash(document: Mapping[str, Any], name: str = "a document") -> str:
    """Returns a hash of a document's title and text: the ID of a document without one.

    Raises:
      InputError: the document has no text; the message begins with `name`.
    """
    return json_sha256([*title_and_text(document, name)])[:32]


def document_hash(document: Mapping[str, Any], name: str = "a document") -> str:
    """Returns a hash of all fields of a document. An empty title counts as none.

    Raises:
      InputError: a field is not a JSON value; the message begins with `name`.
    """
    fields = {key: value for key, value in document.items() if key != "title" or value}
    try:
        return json_sha256(fields)[:32]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} has a field that JSON cannot represent ({error}): convert it, or leave it out"
        ) from None


def _own_id(document: Mapping[str, Any], name: str) -> str | None:
    field = next((field for field in ID_FIELDS if document.get(field) is not None), None)
    if field is None:
        return None
    value = document[field]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InputError(f"{name}: {field!r} is {value!r}: give a string or an integer")
    return str(value)


def _visible_files(folder: Path) -> list[Path]:
    """Returns the files in a folder and its subfolders, without hidden ones."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _read_files(files: Sequence[Path]) -> Iterator[Document | InputError]:
    for file in files:
        if file.name.endswith(JSONL_SUFFIXES):
            yield from _read_jsonl(file)
        else:
            yield _read_text(file)


def _read_jsonl(file: Path) -> Iterator[Document | InputError]:
    try:
        for block in read_blocks(file, MEGABYTE):
            for number, line in block.lines():
                yield _parse(line, f"{file}:{number}")
    except SourceError as error:
        yield InputError(f"{error}: repair the file, or leave it out")


def _parse(line: bytes, name: str) -> Document | InputError:
    try:
        return _checked(parse_line(line), name)
    except RejectedExample as reason:
        return InputError(f"{name} is not a document ({reason}): correct the line")


def _read_text(file: Path) -> Document | InputError:
    try:
        text = file.read_text(encoding="utf-8-sig")  # Files from Windows begin with a BOM.
    except UnicodeDecodeError:
        return InputError(f"{file} is not UTF-8 text: convert it, or leave it out")
    except OSError as error:
        return InputError(f"{file} cannot be read ({error.strerror}): leave it out")
    return _checked({"id": str(file), "text": text}, str(file))


def _read_tfds(name: str) -> Iterator[Document | InputError]:
    try:
        import tensorflow_datasets as tfds  # From the extra `data`; it imports TensorFlow.
    except ImportError:
        raise InputError("tfds: needs TensorFlow Datasets: pip install 'grit-jax[data]'") from None
    split = "train"
    builder: Any
    try:
        builder = tfds.builder(name)
    except ValueError:
        dataset, _, split = name.rpartition("/")
        try:
            builder = tfds.builder(dataset)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{TFDS}{name} is not a dataset of TFDS: {reason}") from None
    return _read_builder(builder, split, name)


def _read_builder(builder: Any, split: str, name: str) -> Iterator[Document | InputError]:
    import tensorflow_datasets as tfds

    builder.download_and_prepare()
    if split not in builder.info.splits:
        splits = ", ".join(builder.info.splits)
        raise InputError(f"{TFDS}{name} has no split {split!r}: use one of {splits}")
    for number, features in enumerate(tfds.as_numpy(builder.as_dataset(split=split))):
        where = f"{TFDS}{name}, example {number}"
        try:
            yield _checked(_as_json(features), where)
        except UnicodeDecodeError:
            yield InputError(f"{where} has a feature that is not UTF-8 text: leave it out")


def _as_json(value: Any) -> Any:
    """Returns features of TFDS as JSON values: bytes become text, arrays become lists."""
    if isinstance(value, Mapping):
        return {key: _as_json(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [_as_json(inner) for inner in value]
    return value.decode() if isinstance(value, bytes) else value


def _checked(document: Mapping[str, Any], name: str) -> Document | InputError:
    try:
        check_document(document, name)
    except InputError as error:
        return error
    return dict(document)


def check_document(document: Any, name: str) -> None:
    """Checks that a document can be embedded and stored.

    Raises:
      InputError: it has no text, or a field is invalid; the message begins with `name`.
    """
    title, text = title_and_text(document, name)
    if not text.strip():
        raise InputError(f"{name} has an empty text: leave it out")
    check_unicode(title + text, name)
    document_id(document, name)
    document_hash(document, name)
