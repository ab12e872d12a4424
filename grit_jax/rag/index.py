"""Documents with their embeddings, and caches if asked for: on disk, searched on the devices.

Legend of dimensions: N documents, Q queries, P embedding.
"""

from collections.abc import Iterable, Iterator
import functools
import itertools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Float, Float32, Int
import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.prompt_encoder import InputError, PromptEncoder
from grit_jax.models import KVCache
from grit_jax.rag.cache_store import FORMATS, read_cache
from grit_jax.rag.documents import Document, identity, text_of
from grit_jax.rag.index_folder import (
    Part,
    check_model,
    damage_named,
    load_documents,
    open_embeddings,
    open_to_add,
    read_settings,
    write_part,
)
from grit_jax.sharding import batch_shards, partition_spec
from grit_jax.text.templates import EMBED

# A part has no more documents, nor bytes of caches before they are stored.
PART_DOCUMENTS, PART_BYTES = 1024, 2**30
# Documents that are embedded together, and those whose caches are made.
EMBEDDED_AT_ONCE, CACHED_AT_ONCE = 128, 8
# Queries that are compared at once, filled up to a power of two: their scores are few, and so are
# the programs that are compiled.
NUMBERS_OF_QUERIES = (1, 2, 4, 8, 16, 32)
QUERIES_AT_ONCE = NUMBERS_OF_QUERIES[-1]


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
        self.settings = read_settings(self.folder)
        check_model(self.settings, model, self.folder)
        self._parts = sorted(self.folder.glob("part-*"))
        loaded = [load_documents(part) for part in self._parts]
        self.documents: list[Document] = [d for documents in loaded for d in documents]
        self._starts = np.cumsum([0, *map(len, loaded)])

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
        starts = range(0, max(1, len(queries)), QUERIES_AT_ONCE)
        parts = [self._search(queries[i : i + QUERIES_AT_ONCE], count) for i in starts]
        scores, numbers = zip(*parts, strict=True)
        return np.concatenate(scores), np.concatenate(numbers)

    def _search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        num_rows = next(rows for rows in NUMBERS_OF_QUERIES if rows >= len(queries))
        padded = np.pad(np.asarray(queries, np.float32), ((0, num_rows - len(queries)), (0, 0)))
        with jax.set_mesh(self._model.mesh):
            found = _nearest(jnp.asarray(padded), *self._placed, count)
        scores, numbers = (np.asarray(array)[: len(queries)] for array in found)
        return scores, numbers

    def cache_of(self, number: int) -> KVCache:
        """Returns the cache of a document, in the type of the model: the stored one, or a new one.

        A new one is of the tokens that were embedded.
        """
        if not self.has_caches:
            _, (cache,) = self._model.encode_corpus(
                [self.documents[number]],
                instruction=EMBED,
                max_length=self.settings["max_length"],
                truncate=self.settings["truncate"],
                get_cache=True,
            )
            return cache
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        dtype = self._model.model.config.dtype
        with damage_named(self._parts[part]):
            return read_cache(self._parts[part], number - int(self._starts[part]), dtype)

    @functools.cached_property
    def _placed(self) -> tuple[jax.Array, jax.Array]:
        """The embeddings, split over the devices by rows, and which rows are documents."""
        shards = batch_shards(self._model.mesh)
        size = len(self.settings["probe"])
        rows = np.zeros((len(self) + -len(self) % shards, size), np.float32)
        for part, start, end in zip(self._parts, self._starts, self._starts[1:], strict=False):
            rows[start:end] = open_embeddings(part)
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
      DocumentIndexError: the index was made in another way, or another process adds to it.
      InputError: a document cannot be read, or is too long; the message has its place, from 0 on.
    """
    folder = Path(folder)
    if caches is not None and caches not in FORMATS:
        raise InputError(f"caches={caches!r} must be None or one of {', '.join(FORMATS)}")
    context = model.model.config.max_position_embeddings
    limit = context if max_length is None else min(max_length, context)
    if limit < 1:
        raise InputError(f"max_length={max_length} must be positive")
    options = {"max_length": limit, "truncate": truncate}
    shown = TextColumn("{task.completed:,.0f} documents added")
    with (
        open_to_add(folder, model, {"caches": caches, **options}),
        Progress(SpinnerColumn(), shown, console=Console(stderr=True)) as progress,
    ):
        known = {identity(d) for part in folder.glob("part-*") for d in load_documents(part)}
        new = _unknown(model, documents, known, **options)
        count, task = 0, progress.add_task("", total=None)
        for part in _parts(model, new, caches, options):
            write_part(folder, part, caches)
            count += len(part[0])
            progress.advance(task, len(part[0]))
    return count


def _unknown(
    model: GritLM, documents: Iterable[Document], known: set[str], max_length: int, truncate: bool
) -> Iterator[Document]:
    """Yields the documents that are not known, each once it is certain that it can be read."""
    token_ids = PromptEncoder(model.tokenizer, model.model.config.vocab_size)
    for number, document in enumerate(documents):
        name = f"document {number}"
        if (key := identity(document, name)) in known:
            continue
        known.add(key)
        text = text_of(document, name)
        num_tokens = len(token_ids.after(EMBED, text, begin=True, name=name))
        if num_tokens > max_length and not truncate:
            raise InputError(
                f"{name}, {text[:50]!r}, has {num_tokens} tokens, instruction included, and "
                f"{max_length} are allowed: split it, raise max_length up to the model's context "
                f"of {model.model.config.max_position_embeddings}, or say truncate=True to cut it"
            )
        yield document


def _parts(
    model: GritLM, documents: Iterator[Document], caches: str | None, options: dict[str, Any]
) -> Iterator[Part]:
    at_once = EMBEDDED_AT_ONCE if caches is None else CACHED_AT_ONCE
    part: Part = ([], [], [])
    num_bytes = 0
    while group := list(itertools.islice(documents, at_once)):
        found = model.encode_corpus(
            group, instruction=EMBED, get_cache=caches is not None, **options
        )
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
