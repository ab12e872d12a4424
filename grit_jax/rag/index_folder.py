"""The files of an index: `index.json`, which has its settings, and parts.

Each part, `part-00000/` and so on, has `documents.jsonl`, `embeddings.npy` and optional KV caches
(see `cache_store`). A part is renamed to its final name when it is complete and never changes, so
building can be interrupted at any time and continued later.
"""

from collections.abc import Iterator
import contextlib
import json
from pathlib import Path
import shutil
import tempfile
from typing import Any

from jaxtyping import Float32
import numpy as np

from grit_jax.files import locked, write_json
from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.models import KVCache
from grit_jax.rag.cache_store import write_caches
from grit_jax.rag.documents import Document

VERSION = 2
REMEDY = "remove it, and build the index again"
# An index stores the model's embedding of these tokens, to recognize the model. Between float32 and
# bfloat16 its cosine similarity is above 0.999.
PROBE_TOKENS = list(range(3, 35))
MIN_COSINE, MIN_NORM_RATIO = 0.99, 0.9


class DocumentIndexError(InputError):
    """An index is missing, damaged or of another model; the message says what to do."""


# Documents, their embeddings and their caches.
Part = tuple[list[Document], list[np.ndarray], list[KVCache]]


def write_part(folder: Path, part: Part, cache_format: str | None) -> None:
    """Adds a part to an index.

    Args:
      folder: folder of the index.
      part: documents, embeddings and caches.
      cache_format: format of the caches, one of `cache_store.FORMATS`, or None to store none.
    """
    documents, embeddings, caches = part
    numbers = [int(other.name.removeprefix("part-")) for other in folder.glob("part-*")]
    number = max(numbers, default=-1) + 1
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as temporary:
        unfinished = Path(temporary) / "part"
        unfinished.mkdir()
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (unfinished / "documents.jsonl").write_text(lines)
        np.save(unfinished / "embeddings.npy", np.concatenate(embeddings).astype(np.float32))
        if cache_format is not None:
            write_caches(unfinished, caches, cache_format)
        unfinished.rename(folder / f"part-{number:05d}")


def load_documents(part: Path) -> list[Document]:
    """Returns the documents of a part, after checking that it has as many embeddings.

    Raises:
      DocumentIndexError: a file is missing or damaged.
    """
    with as_index_errors(part):
        lines = (part / "documents.jsonl").read_text().splitlines()
        documents = [json.loads(line) for line in lines]
        num_embeddings = len(load_embeddings(part))
    if num_embeddings != len(documents):
        raise DocumentIndexError(f"{part} is damaged: {REMEDY}")
    return documents


@contextlib.contextmanager
def as_index_errors(part: Path) -> Iterator[None]:
    """A context manager that turns errors from reading a part's files into `DocumentIndexError`s.

    Raises:
      DocumentIndexError: a file is missing or damaged.
    """
    try:
        yield
    except (FileNotFoundError, ValueError, EOFError) as error:
        raise DocumentIndexError(f"{part} is damaged ({error}): {REMEDY}") from None


def load_embeddings(part: Path) -> Float32[np.ndarray, "N P"]:
    """Returns the memory-mapped embeddings of a part.

    Copy the array and drop it: the file is open as long as the array exists, and an index can have
    more parts than a process may have open files.
    """
    return np.load(part / "embeddings.npy", mmap_mode="r")


@contextlib.contextmanager
def open_for_adding(folder: Path, model: GritLM, options: dict[str, Any]) -> Iterator[None]:
    """Creates the folder of an index, or checks that an existing index has the same options.

    Other processes cannot add to the index until the end of the `with` block.

    Raises:
      DocumentIndexError: the folder has an index with other options or of another model, or files
        that are not an index; or another process is adding to it.
    """
    path = folder / "index.json"
    if not path.exists():
        if folder.exists() and any(not each.name.startswith(".") for each in folder.iterdir()):
            raise DocumentIndexError(
                f"{folder} has files that are not an index: choose another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
    busy = f"another process is adding to {folder}: wait until it has finished"
    with locked(folder, DocumentIndexError(busy)):
        if path.exists():
            settings = _updated_settings(folder, model, options)
        else:
            settings = {"version": VERSION, **options, "probe": _probe(model).tolist()}
        write_json(path, settings)
        for unfinished in folder.glob(".part-*"):
            shutil.rmtree(unfinished)
        yield


def _updated_settings(folder: Path, model: GritLM, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of an index, with a larger `max_length` if it truncated nothing."""
    settings = read_settings(folder)
    check_model(settings, model, folder)
    if not settings["truncate"] and options["max_length"] >= settings["max_length"]:
        settings |= {name: options[name] for name in ("max_length", "truncate")}
    for name, value in options.items():
        if settings[name] != value:
            raise DocumentIndexError(
                f"{folder} was built with {name}={settings[name]!r}, not {value!r}: use the same "
                "value, or choose another folder"
            )
    return settings


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
    if settings.get("version") != VERSION:
        raise DocumentIndexError(
            f"{folder} has version {settings.get('version')}, not {VERSION}: build it again"
        )
    return settings


def _probe(model: GritLM) -> Float32[np.ndarray, " P"]:
    """Returns the model's embedding of `PROBE_TOKENS`."""
    return model.encode([token % model.model.config.vocab_size for token in PROBE_TOKENS])


def check_model(settings: dict[str, Any], model: GritLM, folder: Path) -> None:
    """Checks that an index was built with a model.

    Raises:
      DocumentIndexError: it was built with another model.
    """
    stored, probe = np.array(settings["probe"], np.float32), _probe(model)
    if stored.shape == probe.shape:
        norms = np.linalg.norm(stored), np.linalg.norm(probe)
        cosine = stored @ probe / np.prod(norms)
        if cosine >= MIN_COSINE and min(norms) / max(norms) >= MIN_NORM_RATIO:
            return
    raise DocumentIndexError(
        f"{folder} was built with another model, or with another attention, pooling or "
        "normalization: use the same, or build the index again"
    )
