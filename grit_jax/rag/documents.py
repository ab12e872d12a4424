"""Reads documents from text files, JSONL files or TensorFlow Datasets."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grit_jax.files import json_sha256
from grit_jax.inference.prompt_encoder import InputError, check_unicode, title_and_text
from grit_jax.text.examples import RejectedExample
from grit_jax.text.jsonl import MEGABYTE, SourceError, parse_line, read_blocks

JSONL_SUFFIXES, TEXT_SUFFIXES = (".jsonl", ".jsonl.gz"), (".txt", ".md")
TFDS = "tfds:"

# A document: "text", and optionally "title".
Document = dict[str, str]


def read_documents(source: str) -> Iterator[Document]:
    """Returns an iterator over the documents of a source.

    Args:
      source: a folder with .jsonl, .jsonl.gz, .txt and .md files, or one such file; or a dataset of
        TensorFlow Datasets with the feature "text", as "tfds:NAME" or "tfds:NAME/SPLIT", where NAME
        may include a configuration. A line of a JSONL file is an object with "text" and optionally
        "title"; a text file is one document.

    Raises:
      InputError: the source does not exist or has no documents (raised at once), or a document has
        no text or a file is damaged (raised by the iterator). The message names file and line.
    """
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


def document_hash(document: Mapping[str, Any], name: str = "a document") -> str:
    """Returns a hash of a document's title and text.

    Raises:
      InputError: the document has no text; the message begins with `name`.
    """
    return json_sha256([*title_and_text(document, name)])[:32]


def _visible_files(folder: Path) -> list[Path]:
    """Returns the files in a folder and its subfolders, without hidden ones."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _read_files(files: Sequence[Path]) -> Iterator[Document]:
    for file in files:
        if file.name.endswith(JSONL_SUFFIXES):
            yield from _read_jsonl(file)
        else:
            yield _checked({"text": _read_text(file)}, str(file))


def _read_jsonl(file: Path) -> Iterator[Document]:
    try:
        for block in read_blocks(file, MEGABYTE):
            for number, line in block.lines():
                yield _checked(_parse(line, f"{file}:{number}"), f"{file}:{number}")
    except SourceError as error:
        raise InputError(f"{error}: repair the file, or leave it out") from None


def _parse(line: bytes, where: str) -> Any:
    try:
        return parse_line(line)
    except RejectedExample as reason:
        raise InputError(f"{where} is not a document ({reason}): correct the line") from None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # Files from Windows begin with a BOM.
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text: convert it, or leave it out") from None


def _read_tfds(name: str) -> Iterator[Document]:
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


def _read_builder(builder: Any, split: str, name: str) -> Iterator[Document]:
    import tensorflow_datasets as tfds

    builder.download_and_prepare()
    if split not in builder.info.splits:
        splits = ", ".join(builder.info.splits)
        raise InputError(f"{TFDS}{name} has no split {split!r}: use one of {splits}")
    for number, features in enumerate(tfds.as_numpy(builder.as_dataset(split=split))):
        fields = {key: features.get(key) for key in ("title", "text")}
        strings = {key: value.decode() for key, value in fields.items() if isinstance(value, bytes)}
        yield _checked(strings, f"{TFDS}{name}, example {number}")


def _checked(fields: Any, where: str) -> Document:
    title, text = title_and_text(fields, where)
    if not text.strip():
        raise InputError(f"{where} has an empty text: leave it out")
    check_unicode(title + text, where)
    return {"title": title, "text": text} if title else {"text": text}
