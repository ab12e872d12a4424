"""Documents with their embeddings, and caches if asked for: on disk, searched on the devices.

A folder with `index.json`, which says what it was made with, and parts that are whole or not there:
`part-00000/` has `documents.jsonl`, `embeddings.npy` and maybe caches (`stored_caches`). Nothing in
it is changed once it is there, so that building may end at any moment and go on later.

Legend of dimensions: N documents, Q queries, P embedding.
"""

from collections.abc import Iterable, Iterator
import functools
import itertools
import json
import os
from pathlib import Path
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Float, Float32, Int
import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from grit_jax.data.templates import EMBED
from grit_jax.inference.documents import Document, identity
from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.inputs import InputError
from grit_jax.inference.stored_caches import FORMATS, read_cache, write_caches
from grit_jax.models import Cache
from grit_jax.sharding import batch_shards, partition_spec

VERSION = 1
# A part has no more documents, nor bytes of caches before they are stored.
PART_DOCUMENTS, PART_BYTES = 1024, 2**30
# Documents that are embedded together, and those whose caches are made.
EMBEDDED_AT_ONCE, CACHED_AT_ONCE = 128, 8
REMEDY = "remove it, and build again"
# What tells models apart: how they embed these tokens. In bfloat16 the cosine is above .999.
PROBE = list(range(3, 35))
LEAST_COSINE = 0.99


class DocumentIndexError(InputError):
    """An index is missing, damaged, or another model's; the message says which and what to do."""


class DocumentIndex:
    """An index that is there.

    Args:
      folder: where it lies.
      model: embeds queries, and is what the index was made with.

    Raises:
      DocumentIndexError: there is none, or it was made with another model.
    """

    def __init__(self, folder: str | os.PathLike, model: GritLM):
        self.folder = Path(folder)
        self._model = model
        self.settings = _read_settings(self.folder)
        _check_model(self.settings, model, self.folder)
        self._parts = sorted(self.folder.glob("part-*"))
        loaded = [_load_part(part) for part in self._parts]
        self.documents: list[Document] = [d for documents, _ in loaded for d in documents]
        self._starts = np.cumsum([0, *(len(documents) for documents, _ in loaded)])
        self._embeddings = [embeddings for _, embeddings in loaded]

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def has_caches(self) -> bool:
        """Whether the keys and values of its documents are stored."""
        return self.settings["caches"] is not None

    def search(
        self, queries: Float[np.ndarray, "Q P"], count: int = 1
    ) -> tuple[Float32[np.ndarray, "Q count"], Int[np.ndarray, "Q count"]]:
        """Returns each query's largest inner products, and those documents' numbers, best first.

        All documents are compared, in float32.

        Raises:
          InputError: there are fewer documents than asked for.
        """
        if not 1 <= count <= len(self):
            raise InputError(f"{count} documents were asked for, of {len(self)} in {self.folder}")
        with jax.set_mesh(self._model.mesh):
            scores, numbers = _nearest(jnp.asarray(queries, jnp.float32), *self._placed, count)
        return np.asarray(scores), np.asarray(numbers)

    def cache_of(self, number: int) -> Cache:
        """Returns the stored cache of a document, in the type of the model."""
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        dtype = self._model.model.config.dtype
        return read_cache(self._parts[part], number - int(self._starts[part]), dtype)

    @functools.cached_property
    def _placed(self) -> tuple[jax.Array, jax.Array]:
        """The embeddings, split over the devices by rows, and which rows are documents."""
        shards = batch_shards(self._model.mesh)
        padding = -len(self) % shards
        rows = np.concatenate([*self._embeddings])
        rows = np.pad(rows, ((0, padding), (0, 0)))
        is_document = np.arange(len(rows)) < len(self)
        return jax.device_put(
            (rows, is_document), NamedSharding(self._model.mesh, partition_spec("batch"))
        )


@functools.partial(jax.jit, static_argnames="count")
def _nearest(
    queries: Float[jax.Array, "Q P"],
    embeddings: Float[jax.Array, "N P"],
    is_document: jax.Array,
    count: int,
) -> tuple[jax.Array, jax.Array]:
    scores = jnp.einsum("QP,NP->QN", queries, embeddings, precision="highest")
    return jax.lax.top_k(jnp.where(is_document, scores, -jnp.inf), count)


def build_index(
    model: GritLM,
    documents: Iterable[Document],
    folder: str | os.PathLike,
    *,
    caches: str | None = None,
    max_length: int | None = None,
    truncate: bool = False,
) -> int:
    """Adds documents to an index, which is made if it is not there, and returns how many were new.

    Those that it has already are passed over: after an interruption the same call goes on.

    Args:
      model: embeds them.
      documents: see `documents`.
      folder: of the index.
      caches: to store keys and values as "float32", "bfloat16" or "int8"; None to store none.
      max_length: tokens that a document may have; by default the model's context.
      truncate: cut those that are longer, with a warning.

    Raises:
      DocumentIndexError: the index was made in another way.
      InputError: a document is too long.
    """
    folder = Path(folder)
    if caches is not None and caches not in FORMATS:
        raise InputError(f"caches={caches!r} must be None or one of {', '.join(FORMATS)}")
    _prepare_folder(folder, model, caches)
    known = {identity(d) for part in folder.glob("part-*") for d in _load_part(part)[0]}
    context = model.model.config.max_position_embeddings
    options = {"max_length": max_length or context, "truncate": truncate, "instruction": EMBED}
    new = _unknown(documents, known)
    count = 0
    shown = TextColumn("{task.completed:,.0f} documents added")
    with Progress(SpinnerColumn(), shown, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None)
        for part in _parts(model, new, caches, options):
            _write_part(folder, part, caches)
            count += len(part[0])
            progress.advance(task, len(part[0]))
    return count


def _unknown(documents: Iterable[Document], known: set[str]) -> Iterator[Document]:
    for document in documents:
        if (name := identity(document)) not in known:
            known.add(name)
            yield document


# The documents of a part, their embeddings and caches.
Part = tuple[list[Document], list[np.ndarray], list[Cache]]


def _parts(
    model: GritLM, documents: Iterator[Document], caches: str | None, options: dict[str, Any]
) -> Iterator[Part]:
    at_once = EMBEDDED_AT_ONCE if caches is None else CACHED_AT_ONCE
    part: Part = ([], [], [])
    num_bytes = 0
    while group := list(itertools.islice(documents, at_once)):
        found = model.encode_corpus(group, get_cache=caches is not None, **options)
        embeddings, of_group = (found, []) if caches is None else found
        part[0].extend(group)
        part[1].append(embeddings)
        part[2].extend(of_group)
        num_bytes += sum(2 * cache.keys.nbytes for cache in of_group)
        if len(part[0]) >= PART_DOCUMENTS or num_bytes >= PART_BYTES:
            yield part
            part, num_bytes = ([], [], []), 0
    if part[0]:
        yield part


def _write_part(folder: Path, part: Part, caches: str | None) -> None:
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


def _load_part(part: Path) -> tuple[list[Document], np.ndarray]:
    try:
        lines = (part / "documents.jsonl").read_text().splitlines()
        documents = [json.loads(line) for line in lines]
        embeddings = np.load(part / "embeddings.npy", mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DocumentIndexError(f"{part} is damaged ({error}): {REMEDY}") from None
    if len(embeddings) != len(documents):
        raise DocumentIndexError(f"{part} is damaged: {REMEDY}")
    return documents, embeddings


def _prepare_folder(folder: Path, model: GritLM, caches: str | None) -> None:
    path = folder / "index.json"
    if path.exists():
        settings = _read_settings(folder)
        _check_model(settings, model, folder)
        if settings["caches"] != caches:
            raise DocumentIndexError(
                f"{folder} was made with caches={settings['caches']!r}, not {caches!r}: add to it "
                "in the same way, or choose another folder"
            )
        for unfinished in folder.glob(".part-*"):
            shutil.rmtree(unfinished)
        return
    if folder.exists() and any(not each.name.startswith(".") for each in folder.iterdir()):
        raise DocumentIndexError(f"{folder} has files in it, but no index: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"version": VERSION, "caches": caches, "probe": _probe(model).tolist()}
    incomplete = path.with_name(".incomplete-index.json")
    incomplete.write_text(json.dumps(settings))
    incomplete.replace(path)


def _read_settings(folder: Path) -> dict[str, Any]:
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
    """Returns how the model embeds some tokens, at length 1."""
    ids = [number % model.model.config.vocab_size for number in PROBE]
    embedding = model.encode(ids)
    return embedding / np.linalg.norm(embedding)


def _check_model(settings: dict[str, Any], model: GritLM, folder: Path) -> None:
    theirs, ours = np.array(settings["probe"], np.float32), _probe(model)
    if theirs.shape != ours.shape or float(theirs @ ours) < LEAST_COSINE:
        raise DocumentIndexError(
            f"{folder} was made with another model, or with another pooling or attention: give the "
            "same, or build it again"
        )
