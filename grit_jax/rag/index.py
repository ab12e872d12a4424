"""An index of documents on disk: their embeddings and optional KV caches, searched on the devices.

Legend of dimensions: N documents, Q queries, P embedding.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
import dataclasses
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
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.prompt_encoder import (
    InputError,
    PromptEncoder,
    check_count,
    document_text,
    prompt_of_instruction,
)
from grit_jax.models import KVCache
from grit_jax.rag.cache_store import FORMATS, read_cache, write_caches
from grit_jax.rag.documents import (
    Document,
    Reject,
    check_document,
    document_hash,
    document_id,
    document_name,
    text_hash,
)
from grit_jax.rag.index_folder import (
    DocumentIndexError,
    Rows,
    as_index_errors,
    check_finite,
    check_model,
    load_embeddings,
    next_part_name,
    open_to_build,
    open_to_change,
    read_parts,
    read_settings,
    remove_deleted,
    save_settings,
    write_part,
)
from grit_jax.sharding import batch_shards, shard_rows

# Maximum documents of a part, and maximum bytes of its caches before they are quantized.
PART_DOCUMENTS, PART_BYTES = 1024, 2**30
# Documents that are embedded together, without and with caches.
BATCH_SIZE, BATCH_SIZE_WITH_CACHES = 128, 8
# Queries are searched in batches padded to one of these sizes, so that few programs are compiled.
QUERY_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
# After adding documents, parts with more than this fraction of deleted documents are rewritten.
MAX_DELETED = 0.5


class DocumentIndex:
    """An index that `build_index` has built.

    Args:
      folder: folder of the index.
      model: the model that the index was built with.

    Attributes:
      documents: all documents, with all their fields. `search` returns positions in this list.
      settings: the options that the index was built with.

    Raises:
      DocumentIndexError: there is no index, or it was built with another model.
    """

    def __init__(self, folder: str | os.PathLike, model: GritLM):
        self.folder = Path(folder)
        self._model = model
        self.settings = read_settings(self.folder)
        check_model(self.settings, model, self.folder)
        parts = read_parts(self.folder)
        self.documents: list[Document] = [p.documents[row] for p in parts for row in p.live]
        self._parts = [(part.path, part.live) for part in parts]
        self._starts = np.cumsum([0, *(len(part.live) for part in parts)])

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def has_caches(self) -> bool:
        """Whether the KV caches of the documents are stored."""
        return self.settings["caches"] is not None

    def search(
        self, queries: Float[np.ndarray, "*Q P"], count: int = 1
    ) -> tuple[Float32[np.ndarray, "*Q {count}"], Int[np.ndarray, "*Q {count}"]]:
        """Returns the largest inner products of each query, and where those documents are.

        The search is exact, over all documents, in float32. The nearest document comes first.

        Args:
          queries: embeddings of several queries, or of one.
          count: number of documents for each query.

        Returns:
          The scores, and the documents' positions in `documents`.

        Raises:
          InputError: the index has fewer documents, or an embedding is NaN or has another size.
        """
        queries = np.asarray(queries)
        size = len(self.settings["probe"])
        if queries.shape[-1:] != (size,):
            raise InputError(
                f"the queries' embeddings have the shape {queries.shape}, but those in "
                f"{self.folder} have {size} numbers: encode the queries with the index's model"
            )
        shape, queries = queries.shape[:-1], queries.reshape(-1, size)
        check_finite(queries, "the queries' embeddings")
        check_count("count", count)
        if not 1 <= count <= len(self):
            raise InputError(
                f"{count} documents were requested, but {self.folder} has {len(self)}: request 1 "
                f"to {len(self)}"
            )
        batch_size = QUERY_BATCH_SIZES[-1]
        starts = range(0, max(1, len(queries)), batch_size)
        batches = [self._search_batch(queries[i : i + batch_size], count) for i in starts]
        scores, positions = zip(*batches, strict=True)
        shape = (*shape, count)
        return np.concatenate(scores).reshape(shape), np.concatenate(positions).reshape(shape)

    def _search_batch(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        num_rows = next(size for size in QUERY_BATCH_SIZES if size >= len(queries))
        padded = np.pad(np.asarray(queries, np.float32), ((0, num_rows - len(queries)), (0, 0)))
        with jax.set_mesh(self._model.mesh):
            nearest = _nearest(padded, *self._embeddings, count)
        scores, positions = (np.asarray(array)[: len(queries)] for array in nearest)
        return scores, positions

    def cache_of(self, position: int) -> KVCache:
        """Returns the KV cache of a document, stored or computed, in the model's dtype.

        A computed cache is of the same tokens that were embedded.

        Args:
          position: position of the document in `documents`.
        """
        position = range(len(self))[position]
        if not self.has_caches:
            _, (cache,) = self._model.encode_corpus(
                [self.documents[position]],
                instruction=self.settings["document_prompt"],
                max_length=self.settings["max_length"],
                truncate=self.settings["truncate"],
                get_cache=True,
            )
            return cache
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        part, live = self._parts[number]
        row = int(live[position - int(self._starts[number])])
        with as_index_errors(part):
            return read_cache(part, row, self._model.model.config.dtype)

    @functools.cached_property
    def _embeddings(self) -> tuple[Float32[Array, "N P"], Bool[Array, " N"]]:
        """The embeddings, sharded over the devices by rows, and which rows are not padding."""
        shards = batch_shards(self._model.mesh)
        size = len(self.settings["probe"])
        rows = np.zeros((len(self) + -len(self) % shards, size), np.float32)
        ends = self._starts[1:]
        for (part, live), start, end in zip(self._parts, self._starts, ends, strict=False):
            with as_index_errors(part):
                rows[start:end] = load_embeddings(part)[live]
        check_finite(rows, f"the embeddings in {self.folder}")
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
    best, positions = jax.lax.top_k(jnp.where(is_document, scores, -jnp.inf), count)
    return best, positions


@dataclasses.dataclass
class IndexUpdate:
    """What `build_index` did with the documents.

    Attributes:
      added: documents with a new ID.
      replaced: documents that replaced those with the same ID.
      unchanged: documents that the index already had, with the same fields.
      repeated: those of the replaced documents that were in the same call.
      rejected: documents that were left out.
    """

    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    rejected: int = 0
    repeated: int = 0

    @property
    def total(self) -> int:
        """The number of documents that were read."""
        return self.added + self.replaced + self.unchanged + self.rejected


def build_index(
    model: GritLM,
    documents: Iterable[Document],
    folder: str | os.PathLike,
    *,
    caches: str | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    instruction: str | None = None,
    query_instruction: str | None = None,
    reject: Reject | None = None,
    num_documents: int | None = None,
) -> IndexUpdate:
    """Adds documents to a new or existing index.

    A document replaces the one with the same ID. Documents that the index already has are skipped:
    after an interruption, the same call continues where it stopped.

    Args:
      model: embeds the documents.
      documents: dictionaries with "text" and optionally "title", "id" (or "_id") and any other
        fields of JSON values (see `read_documents`). A document without an ID is identified by its
        title and text.
      folder: folder of the index.
      caches: "float32", "bfloat16" or "int8" to store the KV caches in this format, or None.
      max_length: maximum tokens of a document, by default the model's context.
      truncate: whether to truncate longer documents, with a warning.
      instruction: the instruction for documents in plain words, "" for none. By default the one
        that the index was built with, or the model's.
      query_instruction: the instruction for questions, stored as their default. By default the
        model's.
      reject: leaves out documents that cannot be embedded, and is called with a line about each. By
        default they raise an error.
      num_documents: the number of documents, for the progress bar, if `documents` has no length.

    Raises:
      DocumentIndexError: the index was built with other options, another process is changing it, or
        an embedding is NaN.
      InputError: a document has no text or is too long; the message has its number, from 0 on.
    """
    folder = Path(folder)
    if caches is not None and caches not in FORMATS:
        raise InputError(f"caches={caches!r} must be None or one of {', '.join(FORMATS)}")
    context_length = model.model.config.max_position_embeddings
    if max_length is not None:
        check_count("max_length", max_length)
    limit = context_length if max_length is None else min(max_length, context_length)
    if isinstance(documents, str | bytes | Mapping):
        raise InputError(
            f"documents are of type {type(documents).__name__}: give a list of dictionaries with "
            "'text', or call `read_documents` for files"
        )
    options = {
        "caches": caches,
        "max_length": limit,
        "truncate": truncate,
        "document_prompt": _prompt(model, instruction),
        "query_prompt": _prompt(model, query_instruction),
    }
    if num_documents is None and isinstance(documents, Sized):
        num_documents = len(documents)
    with open_to_build(folder, model, options) as settings, _progress() as progress:
        task = progress.add_task("Embedding", total=num_documents)
        builder = _IndexBuilder(model, folder, settings, reject)
        for update in builder.add(documents):
            progress.update(task, completed=update.total)
        remove_deleted(folder, min_fraction=MAX_DELETED)
    return builder.update


def delete_documents(folder: str | os.PathLike, ids: Sequence[str | int]) -> int:
    """Deletes documents from an index and from the disk, and returns how many were deleted.

    Args:
      folder: folder of the index.
      ids: their IDs. The ID of a document without one is in `Source.id`.

    Raises:
      InputError: `ids` is not a list.
      DocumentIndexError: there is no index, another process is changing it, or it lacks one of the
        documents; then none is deleted.
    """
    folder = Path(folder)
    if isinstance(ids, str | bytes):  # Its characters would be taken for IDs.
        raise InputError(f"ids are of type {type(ids).__name__}: give a list of IDs")
    settings = read_settings(folder)
    with open_to_change(folder):
        found = {
            document_id(part.documents[row]): (part.name, int(row))
            for part in read_parts(folder)
            for row in part.live
        }
        wanted = dict.fromkeys(map(str, ids))
        if missing := [each for each in wanted if each not in found]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DocumentIndexError(
                f"{folder} has no document with the ID {missing[0]!r}{more}: nothing was deleted"
            )
        deleted: Rows = defaultdict(list)
        for each in wanted:
            part, row = found[each]
            deleted[part].append(row)
        save_settings(folder, settings)  # Earlier versions cannot read deletions.
        write_part(folder, [], np.zeros((0, len(settings["probe"])), np.float32), deleted)
        remove_deleted(folder, min_fraction=0.0)
    return len(wanted)


class _IndexBuilder:
    """Embeds documents and writes them in parts.

    Args:
      model: embeds the documents.
      folder: folder of the index, opened with `open_to_build`.
      settings: settings of the index.
      reject: see `build_index`.

    Attributes:
      update: what was done so far.
    """

    def __init__(
        self, model: GritLM, folder: Path, settings: dict[str, Any], reject: Reject | None
    ):
        self.update = IndexUpdate()
        self._model, self._folder, self._settings, self._reject = model, folder, settings, reject
        self._encoder = PromptEncoder(model.tokenizer, model.model.config.vocab_size)
        # By ID: where each document is, and the hash of its fields.
        self._rows: dict[str, tuple[str, int]] = {}
        self._hashes: dict[str, str] = {}
        self._ids_of_call: set[str] = set()
        for part in read_parts(folder):
            for row in part.live:
                key = document_id(part.documents[row])
                self._rows[key] = part.name, int(row)
                self._hashes[key] = document_hash(part.documents[row])
        self._start_part()

    def add(self, documents: Iterable[Document]) -> Iterator[IndexUpdate]:
        """Adds documents, and yields `update` after each batch."""
        has_caches = self._settings["caches"] is not None
        batch_size = BATCH_SIZE_WITH_CACHES if has_caches else BATCH_SIZE
        accepted = self._accepted(documents)
        while batch := list(itertools.islice(accepted, batch_size)):
            self._add_batch(batch, has_caches)
            if len(self._documents) >= PART_DOCUMENTS or self._num_bytes >= PART_BYTES:
                self._write_part()
            yield self.update
        if self._documents:
            self._write_part()
        yield self.update

    def _accepted(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yields the documents to embed: those that are valid and not yet in the index."""
        for number, document in enumerate(documents):
            name = document_name(number, document)
            try:
                check_document(document, name)
                key, content = document_id(document, name), document_hash(document, name)
                copy = text_hash(document)
                # A document with an ID replaces a copy without one.
                has_copy = copy != key and copy in self._hashes
                is_unchanged = self._hashes.get(key) == content and not has_copy
                if not is_unchanged:
                    self._check_length(document, name)
            except InputError as error:
                if self._reject is None:
                    raise
                self._reject(str(error))
                self.update.rejected += 1
                continue
            if is_unchanged:
                self.update.unchanged += 1
                self._ids_of_call.add(key)
                continue
            self._hashes.pop(copy, None)
            self._hashes[key] = content
            yield document

    def _check_length(self, document: Document, name: str) -> None:
        text, prompt = document_text(document, name), self._settings["document_prompt"]
        encoded = self._encoder.encode(text, prompt, add_bos=True, add_eos=True, name=name)
        num_tokens = len(encoded)
        limit = self._settings["max_length"]
        if num_tokens > limit and not self._settings["truncate"]:
            raise InputError(
                f"{name}, {text[:50]!r}, has {num_tokens} tokens, instruction included, but the "
                f"limit is {limit}: split it, raise max_length up to the model's context of "
                f"{self._model.model.config.max_position_embeddings}, or pass truncate=True"
            )

    def _add_batch(self, documents: list[Document], has_caches: bool) -> None:
        encoded = self._model.encode_corpus(
            documents,
            instruction=self._settings["document_prompt"],
            max_length=self._settings["max_length"],
            truncate=self._settings["truncate"],
            get_cache=has_caches,
        )
        embeddings, caches = encoded if has_caches else (encoded, [])
        for document, embedding in zip(documents, embeddings, strict=True):
            key = document_id(document)
            check_finite(embedding, f"the embeddings of document {key!r}")
            old = [self._rows.pop(each, None) for each in {key, text_hash(document)}]
            old = [row for row in old if row is not None]
            for part, row in old:
                self._deleted[part].append(row)
            self._rows[key] = self._part, len(self._documents)
            self._documents.append(document)
            if old:
                self.update.replaced += 1
                self.update.repeated += key in self._ids_of_call
            else:
                self.update.added += 1
            self._ids_of_call.add(key)
        self._embeddings.append(embeddings)
        self._caches += caches
        self._num_bytes += sum(2 * cache.keys.nbytes for cache in caches)

    def _start_part(self) -> None:
        self._part = next_part_name(self._folder)
        self._documents: list[Document] = []
        self._embeddings: list[np.ndarray] = []
        self._caches: list[KVCache] = []
        self._deleted: Rows = defaultdict(list)
        self._num_bytes = 0

    def _write_part(self) -> None:
        caches, cache_format = self._caches, self._settings["caches"]
        has_caches = cache_format is not None
        write_part(
            self._folder,
            self._documents,
            np.concatenate(self._embeddings),
            self._deleted,
            (lambda path: write_caches(path, caches, cache_format)) if has_caches else None,
        )
        self._start_part()


def _prompt(model: GritLM, instruction: str | None) -> str | None:
    """Returns the prompt of an instruction in plain words."""
    if instruction is None:
        return None
    return prompt_of_instruction(instruction, model.embedding_spec)


def _progress() -> Progress:
    """Returns a progress bar on a terminal, with the total, the speed and the time left."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _SpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


class _SpeedColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} documents/s")
