"""Documents to be searched: files of a folder, lines of a jsonl file, or a TFDS dataset."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grit_jax.files import json_sha256
from grit_jax.inference.prompt_encoder import InputError, check_unicode
from grit_jax.text.examples import RejectedExample
from grit_jax.text.jsonl import MEGABYTE, SourceError, parse_line, read_blocks

LINES, TEXTS = (".jsonl", ".jsonl.gz"), (".txt", ".md")
TFDS = "tfds:"

# A document: "text", and maybe "title".
Document = dict[str, str]


def read_documents(source: str) -> Iterator[Document]:
    """Returns an iterator over the documents of a source, each once read.

    Args:
      source: a folder with files .jsonl, .jsonl.gz, .txt and .md, or one such file, or a dataset of
        TFDS with the feature "text": "tfds:NAME" or "tfds:NAME/SPLIT", where a configuration may
        follow the name. A line is an object with "text" and maybe "title"; a text file is one
        document.

    Raises:
      InputError: there is none, which is said at once; later, that a document has no text or a file
        is damaged. The message names file and line.
    """
    if source.startswith(TFDS):
        return _of_tfds(source.removeprefix(TFDS))
    path = Path(source)
    if not path.exists():
        raise InputError(f"{source} does not exist: give a folder, a .jsonl file, or tfds:NAME")
    files = _files_below(path) if path.is_dir() else [path]
    files = [file for file in files if file.name.endswith(LINES + TEXTS) and file.is_file()]
    if not files:
        raise InputError(f"{source} has no files {', '.join(LINES + TEXTS)}")
    return _of_files(files)


def identity(document: Mapping[str, Any], name: str = "a document") -> str:
    """Returns what tells a document from others: a hash of its title and text.

    Raises:
      InputError: it has no text; the message begins with `name`.
    """
    return json_sha256([*_title_and_text(document, name)])[:32]


def text_of(document: Mapping[str, Any], name: str) -> str:
    """Returns what is read of a document: its text, with the title and a space before it.

    Raises:
      InputError: it has no text; the message begins with `name`.
    """
    return " ".join(part for part in _title_and_text(document, name) if part)


def join_documents(corpus: Any) -> Any:
    """Returns the texts of a document, or of a list of them; anything else as it is.

    Raises:
      InputError: a document has no text.
    """
    if isinstance(corpus, Mapping):
        return text_of(corpus, "document 0")
    if isinstance(corpus, Sequence) and corpus and isinstance(corpus[0], Mapping):
        return [text_of(document, f"document {i}") for i, document in enumerate(corpus)]
    return corpus


def _title_and_text(document: Any, name: str) -> tuple[str, str]:
    """Returns both, "" without a title: it may be missing, None or empty."""
    if not isinstance(document, Mapping) or not isinstance(document.get("text"), str):
        raise InputError(f"{name} has no string at 'text'")
    title = document.get("title") or ""
    if not isinstance(title, str):
        raise InputError(f"{name}: 'title' is no string")
    return title, document["text"]


def _files_below(folder: Path) -> list[Path]:
    """Returns what is in a folder and below, without what is hidden, as an editor's copies are."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _of_files(files: Sequence[Path]) -> Iterator[Document]:
    for file in files:
        if file.name.endswith(LINES):
            yield from _of_lines(file)
        else:
            yield _checked({"text": _read_text(file)}, str(file))


def _of_lines(file: Path) -> Iterator[Document]:
    try:
        for block in read_blocks(file, MEGABYTE):
            for number, line in block.lines():
                yield _checked(_parse(line, f"{file}:{number}"), f"{file}:{number}")
    except SourceError as error:
        raise InputError(f"{error}: mend the file, or leave it out") from None


def _parse(line: bytes, where: str) -> Any:
    try:
        return parse_line(line)
    except RejectedExample as reason:
        raise InputError(f"{where} is no document ({reason}): mend the line") from None


def _of_tfds(name: str) -> Iterator[Document]:
    try:
        import tensorflow_datasets as tfds  # Of the extra `data`; it brings TensorFlow.
    except ImportError:
        raise InputError("tfds: needs TensorFlow Datasets: pip install 'grit-jax[data]'") from None
    split = "train"
    builder: Any
    try:
        builder = tfds.builder(name)
    except ValueError:
        whole, _, split = name.rpartition("/")
        try:
            builder = tfds.builder(whole)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{TFDS}{name} is no dataset of TFDS: {reason}") from None
    return _of_builder(builder, split, name)


def _of_builder(builder: Any, split: str, name: str) -> Iterator[Document]:
    import tensorflow_datasets as tfds

    builder.download_and_prepare()
    if split not in builder.info.splits:
        splits = ", ".join(builder.info.splits)
        raise InputError(f"{TFDS}{name} has no split {split!r}: there are {splits}")
    for number, fields in enumerate(tfds.as_numpy(builder.as_dataset(split=split))):
        found = {key: fields.get(key) for key in ("title", "text")}
        strings = {key: value.decode() for key, value in found.items() if isinstance(value, bytes)}
        yield _checked(strings, f"{TFDS}{name}, example {number}")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # Files from Windows begin with a mark.
    except UnicodeDecodeError:
        raise InputError(f"{file} is no UTF-8 text: convert it, or leave it out") from None


def _checked(fields: Any, where: str) -> Document:
    title, text = _title_and_text(fields, where)
    if not text.strip():
        raise InputError(f"{where} has an empty text: leave it out")
    check_unicode(title + text, where)
    return {"title": title, "text": text} if title else {"text": text}
