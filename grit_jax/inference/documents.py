"""Documents to be searched: files of a folder, lines of a jsonl file, or a TFDS dataset."""

from collections.abc import Iterator
import gzip
import json
from pathlib import Path
from typing import Any

from grit_jax.data.fingerprints import fingerprint
from grit_jax.inference.inputs import InputError

LINES, TEXTS = (".jsonl", ".jsonl.gz"), (".txt", ".md")
TFDS = "tfds:"

# A document: "text", and maybe "title".
Document = dict[str, str]


def read_documents(source: str) -> Iterator[Document]:
    """Yields the documents of a source, each once read.

    Args:
      source: a folder with files .jsonl, .jsonl.gz, .txt and .md, or one such file, or a dataset of
        TFDS with the feature "text": "tfds:NAME" or "tfds:NAME/SPLIT", where a configuration may
        follow the name. A line is an object with "text" and maybe "title"; a text file is one
        document.

    Raises:
      InputError: there is none, or a document has no text; the message names file and line.
    """
    if source.startswith(TFDS):
        yield from _of_tfds(source.removeprefix(TFDS))
        return
    path = Path(source)
    if not path.exists():
        raise InputError(f"{source} does not exist: give a folder, a .jsonl file, or tfds:NAME")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.name.endswith(LINES + TEXTS)]
    if not files:
        raise InputError(f"{source} has no files {', '.join(LINES + TEXTS)}")
    for file in files:
        if file.name.endswith(LINES):
            yield from _of_lines(file)
        else:
            yield _checked({"text": _read_text(file)}, str(file))


def identity(document: Document) -> str:
    """Returns what tells a document from others: a hash of its title and text."""
    return fingerprint([document.get("title", ""), document["text"]])[:32]


def _of_lines(file: Path) -> Iterator[Document]:
    opened = gzip.open if file.name.endswith(".gz") else open
    with opened(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                try:
                    fields = json.loads(line)
                except ValueError:
                    raise InputError(f"{file}:{number} is no JSON object: mend the line") from None
                yield _checked(fields, f"{file}:{number}")


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
    builder.download_and_prepare()
    if split not in builder.info.splits:
        splits = ", ".join(builder.info.splits)
        raise InputError(f"{TFDS}{name} has no split {split!r}: there are {splits}")
    for number, fields in enumerate(tfds.as_numpy(builder.as_dataset(split=split))):
        decoded = {key: value.decode() for key, value in fields.items() if key in ("title", "text")}
        yield _checked(decoded, f"{TFDS}{name}, example {number}")


def _read_text(file: Path) -> str:
    try:
        return file.read_text()
    except UnicodeDecodeError:
        raise InputError(f"{file} is no UTF-8 text: convert it, or leave it out") from None


def _checked(fields: Any, where: str) -> Document:
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise InputError(f"{where} has no string at 'text'")
    if not fields["text"].strip():
        raise InputError(f"{where} has an empty text: leave it out")
    title = fields.get("title") or ""
    if not isinstance(title, str):
        raise InputError(f"{where}: 'title' is no string")
    return {"title": title, "text": fields["text"]} if title else {"text": fields["text"]}
