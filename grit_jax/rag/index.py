"""An index of documents on disk: their embeddings and optional KV caches, searched on the devices.

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
from jaxtyping import Array, Bool, Float, Float32, Int
import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.prompt_encoder import InputError, PromptEncoder, document_text
from grit_jax.models import KVCache
from grit_jax.rag.cache_store import FORMATS, read_cache
from grit_jax.rag.documents import Document, document_hash
from grit_jax.rag.index_folder import (
    Part,
    as_index_errors,
    check_model,
    load_documents,
    load_embeddings,
    open_for_adding,
    read_settings,
    write_part,
)
from grit_jax.sharding import batch_shards, shard_rows
from grit_jax.text.templates import EMBED

# Maximum documents of a part, and maximum bytes of its caches before they are quantized.
PART_DOCUMENTS, PART_BYTES = 1024, 2**30
# Documents that are embedded together, without and with caches.
BATCH_SIZE, BATCH_SIZE_WITH_CACHES = 128, 8
# Queries are searched in batches padded to one of these sizes, so that few programs are compiled.
QUERY_BATCH_SIZES = (1, 2, 4, 8, 16, 32)


class DocumentIndex:
    """An index that `build_index` has built.

    Args:
      folder: folder of the index.
      model: the model that the index was built with.

    Attributes:
      documents: all documents; the index of a document in this list is its ID.

    Raises:
      DocumentIndexError: there is no index, or it was built with another model.
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
        """Whether the KV caches of the documents are stored."""
        return self.settings["caches"] is not None

    def search(
        self, queries: Float[np.ndarray, "Q P"], count: int = 1
    ) -> tuple[Float32[np.ndarray, "Q {count}"], Int[np.ndarray, "Q {count}"]]:
        """Returns the largest inner products of each query, and the ids of those documents.

        The search is exact, over all documents, in float32. The nearest document comes first.

        Args:
          queries: embeddings of the queries.
          count: number of documents for each query.

        Raises:
          InputError: the index has fewer documents.
        """
        if not 1 <= count <= len(self):
            raise InputError(
                f"{count} documents were requested, but {self.folder} has {len(self)}: request 1 "
                f"to {len(self)}"
            )
        batch_size = QUERY_BATCH_SIZES[-1]
        starts = range(0, max(1, len(queries)), batch_size)
        batches = [self._search_batch(queries[i : i + batch_size], count) for i in starts]
        scores, document_ids = zip(*batches, strict=True)
        return np.concatenate(scores), np.concatenate(document_ids)

    def _search_batch(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        num_rows = next(size for size in QUERY_BATCH_SIZES if size >= len(queries))
        padded = np.pad(np.asarray(queries, np.float32), ((0, num_rows - len(queries)), (0, 0)))
        with jax.set_mesh(self._model.mesh):
            nearest = _nearest(padded, *self._embeddings, count)
        scores, document_ids = (np.asarray(array)[: len(queries)] for array in nearest)
        return scores, document_ids

    def cache_of(self, document_id: int) -> KVCache:
        """Returns the KV cache of a document, stored or computed, in the model's dtype.

        A computed cache is of the same tokens that were embedded.
        """
        if not self.has_caches:
            _, (cache,) = self._model.encode_document(
                [self.documents[document_id]],
                max_length=self.settings["max_length"],
                truncate=self.settings["truncate"],
                get_cache=True,
            )
            return cache
        part = int(np.searchsorted(self._starts, document_id, side="right")) - 1
        dtype = self._model.model.config.dtype
        with as_index_errors(self._parts[part]):
            return read_cache(self._parts[part], document_id - int(self._starts[part]), dtype)

    @functools.cached_property
    def _embeddings(self) -> tuple[Float32[Array, "N P"], Bool[Array, " N"]]:
        """The embeddings, sharded over the devices by rows, and which rows are not padding."""
        shards = batch_shards(self._model.mesh)
        size = len(self.settings["probe"])
        rows = np.zeros((len(self) + -len(self) % shards, size), np.float32)
        for part, start, end in zip(self._parts, self._starts, self._starts[1:], strict=False):
            rows[start:end] = load_embeddings(part)
        is_document = np.arange(len(rows)) < len(self)
        return shard_rows((rows, is_document), self._model.mesh)


@functools.partial(jax.jit, static_argnames="count")
def _nearest(
    queries: Float[Array, "Q P"],
    embeddings: Float[Array, "N P"],
    is_document: Bool[Array, " N"],
    count: int,
) -> tuple[Float[Array, "Q {count}"], Int[Array, "Q {count}"]]:
    scores = jnp.einsum("QP,NP->QN", queries, embeddings, precision="highest")
    best, document_ids = jax.lax.top_k(jnp.where(is_document, scores, -jnp.inf), count)
    return best, document_ids


def build_index(
    model: GritLM,
    documents: Iterable[Document],
    folder: str | os.PathLike,
    *,
    caches: str | None = None,
    max_length: int | None = None,
    truncate: bool = False,
) -> int:
    """Adds documents to a new or existing index, and returns how many were added.

    Documents that the index already has are skipped: after an interruption, the same call continues
    where it stopped.

    Args:
      model: embeds the documents.
      documents: dictionaries with "text" and optionally "title" (see `read_documents`).
      folder: folder of the index.
      caches: "float32", "bfloat16" or "int8" to store the KV caches in this format, or None.
      max_length: maximum tokens of a document, by default the model's context.
      truncate: whether to truncate longer documents, with a warning.

    Raises:
      DocumentIndexError: the index was built with other options, or another process is adding to
        it.
      InputError: a document has no text or is too long; the message has its number, from 0 on.
    """
    folder = Path(folder)
    if caches is not None and caches not in FORMATS:
        raise InputError(f"caches={caches!r} must be None or one of {', '.join(FORMATS)}")
    context_length = model.model.config.max_position_embeddings
    limit = context_length if max_length is None else min(max_length, context_length)
    if limit < 1:
        raise InputError(f"max_length={max_length} must be positive")
    limits = {"max_length": limit, "truncate": truncate}
    column = TextColumn("{task.completed:,.0f} documents added")
    with (
        open_for_adding(folder, model, {"caches": caches, **limits}),
        Progress(SpinnerColumn(), column, console=Console(stderr=True)) as progress,
    ):
        known = {document_hash(d) for part in folder.glob("part-*") for d in load_documents(part)}
        new = _new_documents(model, documents, known, **limits)
        count, task = 0, progress.add_task("", total=None)
        for part in _embedded_parts(model, new, caches, limits):
            write_part(folder, part, caches)
            count += len(part[0])
            progress.advance(task, len(part[0]))
    return count


def _new_documents(
    model: GritLM, documents: Iterable[Document], known: set[str], max_length: int, truncate: bool
) -> Iterator[Document]:
    """Yields the documents that are not in the index, after checking that they can be embedded."""
    encoder = PromptEncoder(model.tokenizer, model.model.config.vocab_size)
    for number, document in enumerate(documents):
        name = f"document {number}"
        if (key := document_hash(document, name)) in known:
            continue
        known.add(key)
        text = document_text(document, name)
        num_tokens = len(encoder.encode(text, EMBED, add_bos=True, add_eos=True, name=name))
        if num_tokens > max_length and not truncate:
            raise InputError(
                f"{name}, {text[:50]!r}, has {num_tokens} tokens, instruction included, but the "
                f"limit is {max_length}: split it, raise max_length up to the model's context of "
                f"{model.model.config.max_position_embeddings}, or pass truncate=True"
            )
        yield document


def _embedded_parts(
    model: GritLM, documents: Iterator[Document], caches: str | None, limits: dict[str, Any]
) -> Iterator[Part]:
    batch_size = BATCH_SIZE if caches is None else BATCH_SIZE_WITH_CACHES
    part: Part = ([], [], [])
    num_bytes = 0
    while batch := list(itertools.islice(documents, batch_size)):
        encoded = model.encode_document(batch, get_cache=caches is not None, **limits)
        embeddings, batch_caches = (encoded, []) if caches is None else encoded
        part[0].extend(batch)
        part[1].append(embeddings)
        part[2].extend(batch_caches)
        num_bytes += sum(2 * cache.keys.nbytes for cache in batch_caches)
        if len(part[0]) >= PART_DOCUMENTS or num_bytes >= PART_BYTES:
            yield part
            part, num_bytes = ([], [], []), 0
    if part[0]:
        yield part
