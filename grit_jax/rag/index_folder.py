"""The folder of an index: what it was made with, and parts that are whole or not there.

`part-00000/` has `documents.jsonl`, `embeddings.npy` and maybe caches (`stored_caches`). Nothing in
it is changed once it is there, so that building may end at any moment and go on later.
"""

from collections.abc import Iterator
import contextlib
import json
from pathlib import Path
import shutil
import tempfile
from typing import Any

import numpy as np

from grit_jax.files import locked, write_json
from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.models import KVCache
from grit_jax.rag.cache_store import write_caches
from grit_jax.rag.documents import Document

VERSION = 2
REMEDY = "remove it, and build again"
# What tells models apart: how they embed these tokens. In bfloat16 the cosine is above .999.
PROBE = list(range(3, 35))
LEAST_COSINE, LEAST_RATIO_OF_LENGTHS = 0.99, 0.9


class DocumentIndexError(InputError):
    """An index is missing, damaged, or another model's; the message says which and what to do."""


# The documents of a part, their embeddings and caches.
Part = tuple[list[Document], list[np.ndarray], list[KVCache]]


def write_part(folder: Path, part: Part, caches: str | None) -> None:
    """Adds a part to an index, with its caches in this form if there is one."""
    documents, embeddings, of_documents = part
    numbers = [int(other.name.removeprefix("part-")) for other in folder.glob("part-*")]
    number = max(numbers, default=-1) + 1
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as aside:
        unfinished = Path(aside) / "part"
        unfinished.mkdir()
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (unfinished / "documents.jsonl").write_text(lines)
        np.save(unfinished / "embeddings.npy", np.concatenate(embeddings).astype(np.float32))
        if caches is not None:
            write_caches(unfinished, of_documents, caches)
        unfinished.rename(folder / f"part-{number:05d}")


def load_documents(part: Path) -> list[Document]:
    """Returns the documents of a part, with as many embeddings beside them.

    Raises:
      DocumentIndexError: a file is missing or damaged.
    """
    with damage_named(part):
        lines = (part / "documents.jsonl").read_text().splitlines()
        documents = [json.loads(line) for line in lines]
        num_embeddings = len(open_embeddings(part))
    if num_embeddings != len(documents):
        raise DocumentIndexError(f"{part} is damaged: {REMEDY}")
    return documents


@contextlib.contextmanager
def damage_named(part: Path) -> Iterator[None]:
    """Says which part it is where one of its files cannot be read.

    Raises:
      DocumentIndexError: a file is missing or damaged.
    """
    try:
        yield
    except (FileNotFoundError, ValueError, EOFError) as error:
        raise DocumentIndexError(f"{part} is damaged ({error}): {REMEDY}") from None


def open_embeddings(part: Path) -> np.ndarray:
    """Returns the embeddings of a part on the disk.

    The file is open as long as there is the array, and an index may have more parts than a process
    may open files: copy them, and let go.
    """
    return np.load(part / "embeddings.npy", mmap_mode="r")


@contextlib.contextmanager
def open_to_add(folder: Path, model: GritLM, made_with: dict[str, Any]) -> Iterator[None]:
    """Makes the folder of an index, or checks that one is there that was made in this way.

    Until the end of the `with` no other process can add to it.

    Raises:
      DocumentIndexError: it was made in another way or with another model, is no index, or another
        process adds to it.
    """
    path = folder / "index.json"
    if not path.exists():
        if folder.exists() and any(not each.name.startswith(".") for each in folder.iterdir()):
            raise DocumentIndexError(
                f"{folder} has files in it, but no index: choose another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
    busy = f"another process is adding to {folder}: wait until it has ended"
    with locked(folder, DocumentIndexError(busy)):
        if path.exists():
            settings = _settings_to_add(folder, model, made_with)
        else:
            settings = {"version": VERSION, **made_with, "probe": _probe(model).tolist()}
        write_json(path, settings)
        for unfinished in folder.glob(".part-*"):
            shutil.rmtree(unfinished)
        yield


def _settings_to_add(folder: Path, model: GritLM, made_with: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of an index, with longer limits where those change nothing in it."""
    settings = read_settings(folder)
    check_model(settings, model, folder)
    # None of its documents was cut: with more room each is what it was.
    if not settings["truncate"] and made_with["max_length"] >= settings["max_length"]:
        settings |= {name: made_with[name] for name in ("max_length", "truncate")}
    for name, value in made_with.items():
        if settings[name] != value:
            raise DocumentIndexError(
                f"{folder} was made with {name}={settings[name]!r}, not {value!r}: add to it "
                "in the same way, or choose another folder"
            )
    return settings


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns what an index was made with.

    Raises:
      DocumentIndexError: there is none, or it is of another version.
    """
    try:
        settings = json.loads((folder / "index.json").read_text())
    except FileNotFoundError:
        raise DocumentIndexError(f"{folder} is no index: run grit-jax rag build") from None
    except ValueError as error:
        raise DocumentIndexError(f"{folder}/index.json is damaged ({error})") from None
    if settings.get("version") != VERSION:
        raise DocumentIndexError(f"{folder} has version {settings.get('version')}: build it again")
    return settings


def _probe(model: GritLM) -> np.ndarray:
    """Returns how the model embeds some tokens."""
    return model.encode([number % model.model.config.vocab_size for number in PROBE])


def check_model(settings: dict[str, Any], model: GritLM, folder: Path) -> None:
    """Checks that a model is the one that an index was made with.

    Raises:
      DocumentIndexError: it is another one.
    """
    theirs, ours = np.array(settings["probe"], np.float32), _probe(model)
    if theirs.shape == ours.shape:
        lengths = np.linalg.norm(theirs), np.linalg.norm(ours)
        cosine = theirs @ ours / np.prod(lengths)
        ratio = min(lengths) / max(lengths)
        if cosine >= LEAST_COSINE and ratio >= LEAST_RATIO_OF_LENGTHS:
            return
    raise DocumentIndexError(
        f"{folder} was made with another model, or with another pooling, attention or scaling of "
        "its embeddings: give the same, or build it again"
    )
