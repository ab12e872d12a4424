"""The files of an index: `index.json`, which has its settings, and parts.

    index.json              version, settings and a fingerprint of the model
    part-00000/             documents that were added together
      documents.jsonl       one document per line, with all its fields
      embeddings.npy        float32 [documents, embedding]
      deleted.json          optional: {"part-00000": [3, 5]}, rows of this and earlier parts that
                            this part deletes or replaces
      starts.npy, ...       optional KV caches (see `cache_store`)
    part-00001/             ...

A part is renamed to its final name when it is complete and never changes. Changes can therefore be
interrupted at any time: a part's documents and what they replace appear together. Parts are
numbered in order, and a number is never used twice.

Legend of dimensions: N documents, P embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
from pathlib import Path
import shutil
from typing import Any

from jaxtyping import Float, Float32, Int
import numpy as np

from grit_jax.files import locked, write_json
from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.rag.cache_store import copy_caches
from grit_jax.rag.documents import Document
from grit_jax.rag.model_fingerprint import fingerprint, is_same_model
from grit_jax.text.templates import EMBED

VERSION = 3
# Indexes of version 2 embed documents with this prompt, and have no `deleted.json`.
PROMPTS_OF_VERSION_2 = {"document_prompt": EMBED, "query_prompt": None}
REMEDY = "remove it, and build the index again"

# Row numbers by the name of their part.
Rows = dict[str, list[int]]


class DocumentIndexError(InputError):
    """An index is missing, damaged or of another model; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of an index.

    Attributes:
      path: its folder.
      documents: all its documents, deleted ones included.
      deleted: the rows that it deletes.
      live: the rows of its documents that no part has deleted.
    """

    path: Path
    documents: list[Document]
    deleted: Rows
    live: Int[np.ndarray, " live"]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.path.name


def read_parts(folder: Path) -> list[Part]:
    """Returns the parts of an index, in order.

    Raises:
      DocumentIndexError: a file is missing or damaged.
    """
    while True:
        paths = _part_paths(folder)
        try:
            parts = [_read_part(path) for path in paths]
        except DocumentIndexError:
            if paths == _part_paths(folder):
                raise
            continue
        # Another process may have added or removed parts in the meantime.
        if paths == _part_paths(folder):
            return _without_deleted(parts)


def count_documents(folder: Path) -> int:
    """Returns the number of documents in an index.

    Raises:
      DocumentIndexError: a file is missing or damaged.
    """
    return sum(len(part.live) for part in read_parts(folder))


def _part_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"), key=_part_number)


def _part_number(path: Path) -> int:
    return int(path.name.removeprefix("part-"))


def _read_part(path: Path) -> Part:
    with as_index_errors(path):
        lines = (path / "documents.jsonl").read_text().splitlines()
        documents = [json.loads(line) for line in lines]
        deleted_file = path / "deleted.json"
        deleted = json.loads(deleted_file.read_text()) if deleted_file.exists() else {}
        num_embeddings = len(load_embeddings(path))
    if num_embeddings != len(documents):
        raise DocumentIndexError(f"{path} is damaged: {REMEDY}")
    return Part(path, documents, deleted, np.arange(len(documents)))


def _without_deleted(parts: Sequence[Part]) -> list[Part]:
    is_live = {part.name: np.ones(len(part.documents), bool) for part in parts}
    for part in parts:
        for name, rows in part.deleted.items():
            if name in is_live:  # A part without live documents may have been removed.
                is_live[name][rows] = False
    return [dataclasses.replace(p, live=np.flatnonzero(is_live[p.name])) for p in parts]


def next_part_name(folder: Path) -> str:
    """Returns the name of the part that is written next."""
    paths = _part_paths(folder)
    return f"part-{_part_number(paths[-1]) + 1 if paths else 0:05d}"


def write_part(
    folder: Path,
    documents: Sequence[Document],
    embeddings: Float[np.ndarray, "N P"],
    deleted: Mapping[str, Sequence[int]],
    write_caches: Callable[[Path], None] | None = None,
) -> None:
    """Adds a part to an index, under the name `next_part_name`.

    Args:
      folder: folder of the index, opened with `open_to_change`.
      documents: its documents.
      embeddings: their embeddings.
      deleted: the rows that the part deletes, by the name of their part.
      write_caches: writes the documents' caches into a folder, or None to store none.
    """
    name = next_part_name(folder)
    unfinished = folder / f".{name}"
    unfinished.mkdir()
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (unfinished / "documents.jsonl").write_text(lines)
    np.save(unfinished / "embeddings.npy", embeddings.astype(np.float32))
    if deleted:
        (unfinished / "deleted.json").write_text(json.dumps(deleted) + "\n")
    if write_caches is not None and documents:
        write_caches(unfinished)
    unfinished.rename(folder / name)


def remove_deleted(folder: Path, min_fraction: float) -> None:
    """Removes deleted documents from the disk.

    Args:
      folder: folder of the index, opened with `open_to_change`.
      min_fraction: parts are rewritten if more than this fraction of their documents is deleted.
    """
    for part in read_parts(folder):
        num_deleted = len(part.documents) - len(part.live)
        if len(part.live) and num_deleted > min_fraction * len(part.documents):
            _rewrite_part(folder, part)
    parts = read_parts(folder)
    names = {part.name for part in parts}
    for part in parts[:-1]:  # The last one keeps its number from being used again.
        # A part whose deletions are still needed has to stay.
        if not len(part.live) and not names & (part.deleted.keys() - {part.name}):
            unfinished = folder / f".{part.name}"
            part.path.rename(unfinished)
            shutil.rmtree(unfinished)
            names.remove(part.name)


def _rewrite_part(folder: Path, part: Part) -> None:
    """Writes the live documents of a part into a new part, which deletes them from the old one."""
    has_caches = (part.path / "starts.npy").exists()
    write_part(
        folder,
        [part.documents[row] for row in part.live],
        load_embeddings(part.path)[part.live],
        {part.name: part.live.tolist()},
        (lambda path: copy_caches(part.path, part.live, path)) if has_caches else None,
    )


@contextlib.contextmanager
def as_index_errors(part: Path) -> Iterator[None]:
    """A context manager that turns errors from reading a part's files into `DocumentIndexError`s.

    Raises:
      DocumentIndexError: a file is missing or damaged.
    """
    try:
        yield
    except (FileNotFoundError, ValueError, EOFError, IndexError) as error:
        if part.parent.exists() and not part.exists():
            raise DocumentIndexError(
                f"{part} was removed by another process that changed the index: open it again"
            ) from None
        raise DocumentIndexError(f"{part} is damaged ({error}): {REMEDY}") from None


def load_embeddings(part: Path) -> Float32[np.ndarray, "N P"]:
    """Returns the memory-mapped embeddings of a part.

    Copy the array and drop it: the file is open as long as the array exists, and an index can have
    more parts than a process may have open files.
    """
    return np.load(part / "embeddings.npy", mmap_mode="r")


@contextlib.contextmanager
def open_to_build(folder: Path, model: GritLM, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Creates an index, or opens one that has the same options; yields its settings.

    Other processes cannot change the index until the end of the `with` block.

    Args:
      folder: folder of the index.
      model: the model that embeds the documents.
      options: the settings that are given. A prompt of None is the index's, or else the model's.

    Raises:
      DocumentIndexError: the folder has an index with other options or of another model, or files
        that are not an index; another process is changing it; or the model's embeddings are NaN.
    """
    path, new_settings = folder / "index.json", None
    if not path.exists():
        if folder.exists() and any(not each.name.startswith(".") for each in folder.iterdir()):
            raise DocumentIndexError(
                f"{folder} has files that are not an index: choose another folder"
            )
        new_settings = _new_settings(model, options)
        folder.mkdir(parents=True, exist_ok=True)
    with open_to_change(folder):
        if new_settings is None or path.exists():
            settings = _updated_settings(folder, model, options)
        else:
            settings = new_settings
        save_settings(folder, settings)
        yield settings


@contextlib.contextmanager
def open_to_change(folder: Path) -> Iterator[None]:
    """Locks an index until the end of the `with` block, and removes what was interrupted.

    Raises:
      DocumentIndexError: another process is changing the index.
    """
    busy = f"another process is changing {folder}: wait until it has finished"
    with locked(folder, DocumentIndexError(busy)):
        for unfinished in folder.glob(".part-*"):
            shutil.rmtree(unfinished)
        yield


def _new_settings(model: GritLM, options: dict[str, Any]) -> dict[str, Any]:
    spec = model.embedding_spec
    prompts = {
        "document_prompt": spec.document_prompt,
        # None takes the model's, which may have got an instruction in the meantime.
        "query_prompt": None if spec.query_prompt == EMBED else spec.query_prompt,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return {"version": VERSION, **options, **prompts, **given, **fingerprint(model)}


def _updated_settings(folder: Path, model: GritLM, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of an index, with those of the options that may change."""
    settings = read_settings(folder)
    check_model(settings, model, folder)
    options = {
        name: settings[name] if name.endswith("_prompt") and value is None else value
        for name, value in options.items()
    }
    settings["query_prompt"] = options["query_prompt"]
    if not settings["truncate"] and options["max_length"] >= settings["max_length"]:
        settings |= {name: options[name] for name in ("max_length", "truncate")}
    for name, value in options.items():
        if settings[name] != value:
            raise DocumentIndexError(
                f"{folder} was built with {name}={settings[name]!r}, not {value!r}: use the same "
                "value, or choose another folder"
            )
    return settings


def save_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of an index."""
    write_json(folder / "index.json", settings)


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns the options that an index was built with.

    Raises:
      DocumentIndexError: there is no index, or it has another version.
    """
    try:
        settings = json.loads((folder / "index.json").read_text())
    except FileNotFoundError:
        raise DocumentIndexError(f"{folder} is not an index: run grit-jax rag build") from None
    except ValueError as error:
        raise DocumentIndexError(f"{folder}/index.json is damaged ({error}): {REMEDY}") from None
    if settings.get("version") == 2:
        settings |= {"version": VERSION, **PROMPTS_OF_VERSION_2}
    if settings.get("version") != VERSION:
        raise DocumentIndexError(
            f"{folder} has version {settings.get('version')}, not {VERSION}: build it again"
        )
    return settings


def check_finite(embeddings: Float[np.ndarray, "*shape"], name: str) -> None:
    """Checks that embeddings have no NaN and no infinity.

    Raises:
      DocumentIndexError: they have; the message begins with `name`.
    """
    if not np.isfinite(embeddings).all():
        raise DocumentIndexError(
            f"{name} are NaN or infinite: check the model's weights, or use float32"
        )


def check_model(settings: dict[str, Any], model: GritLM, folder: Path) -> None:
    """Checks that an index was built with a model.

    Raises:
      DocumentIndexError: it was built with another model.
    """
    if not is_same_model(settings, model):
        raise DocumentIndexError(
            f"{folder} was built with another model, or with another attention, pooling or "
            "normalization: use the same, or build the index again"
        )
