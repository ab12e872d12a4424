"""The engine: continuous batching of requests that come and go (arXiv 2309.06180).

One thread owns the devices. It repeats a turn of four steps:

1. One call that is not generation, such as a batch of texts to embed: the one that waits longest.
2. Waiting requests start, if there are pages for them.
3. One chunk of one or several prompts is read.
4. All requests whose prompts are read generate a few tokens.

So a request waits in each turn for one call of each kind, however long the other requests are.
`Scheduler` decides which requests are served, `PagedPrograms` runs the model.
"""

from __future__ import annotations

import atexit
from collections import deque
from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import functools
import hashlib
import itertools
import queue
import threading
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from grit_jax.arithmetic import round_up
from grit_jax.inference.generate import NOT_FINITE, Request
from grit_jax.inference.page_pool import PagePool
from grit_jax.inference.paged_programs import (
    MAX_STEPS,
    NO_TOKEN,
    PagedPrograms,
    Rows,
    pages_per_row,
    row_counts,
)
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.inference.results import GenerationResult, NotFiniteError
from grit_jax.inference.sampling import RowSampling, Sampling
from grit_jax.inference.scheduler import READ_SHAPES, Scheduler, TokenSequence
from grit_jax.models import Decoder, KVCache
from grit_jax.sharding import batch_shards

# Tokens in a page: a shared prefix is shared in multiples of this.
PAGE_SIZE = 32
# Tokens that are generated in a turn while a request is streamed or something else waits.
SHORT_STEPS = 4
GREEDY = Sampling()


class Generation:
    """A request that the engine has accepted. Safe to use from any thread.

    Args:
      request: a request with one prompt.
      result: collects the tokens.
      sequence: the tokens, for the scheduler.
      max_steps: tokens that may be generated before their text is delivered.
      on_cancel: called when the request is cancelled.
    """

    def __init__(
        self,
        request: Request,
        result: GenerationResult,
        sequence: TokenSequence,
        max_steps: int,
        on_cancel: Callable[[], None],
    ):
        self.request, self.result_so_far, self.sequence = request, result, sequence
        self.max_steps, self.is_cancelled = max_steps, False
        self._on_cancel = on_cancel
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._future: concurrent.futures.Future[GenerationResult] = concurrent.futures.Future()

    def __iter__(self) -> Iterator[str]:
        """Yields the text in pieces, each when it is complete; raises as `result` does."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        if not self.is_cancelled:
            self._future.result()

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Waits for the end, and returns the result.

        Args:
          timeout: maximum seconds to wait; None for no limit.

        Raises:
          NotFiniteError: the logits are NaN.
          concurrent.futures.CancelledError: the request was cancelled.
          TimeoutError: the request has not ended in time.
        """
        return self._future.result(timeout)

    def cancel(self) -> None:
        """Ends the request; its pages are released before the next call of the model."""
        self.is_cancelled = True
        self._on_cancel()

    def deliver(self, tokens: Sequence[int]) -> None:
        """Adds generated tokens. Called by the engine, as are the next two."""
        if text := self.result_so_far.push(np.array(tokens, np.int32)):
            self._pieces.put(text)

    def finish(self) -> None:
        """Ends the request with its result."""
        if text := self.result_so_far.finish():
            self._pieces.put(text)
        self._future.set_result(self.result_so_far)
        self._pieces.put(None)

    def fail(self, error: BaseException | None) -> None:
        """Ends the request with an error, or None if it was cancelled."""
        if error is None:
            self._future.cancel()
        else:
            self._future.set_exception(error)
        self._pieces.put(None)


class Engine:
    """Generates for many requests at once, on a thread that alone uses the devices.

    Args:
      model: model with its parameters on the mesh.
      mesh: the devices over which rows and heads are split.
      end_tokens: tokens that end a result.
      cache_tokens: number of tokens, of all requests together, whose keys and values are kept.
      max_running: maximum number of requests that generate together.

    Attributes:
      scheduler: decides which requests are served. Only the engine's thread changes it.

    Raises:
      HeadError: the model does not generate.
      InputError: there are several processes, or keys depend on the length of the prompt.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        end_tokens: Sequence[int],
        *,
        cache_tokens: int,
        max_running: int,
    ):
        model.check_has_head()
        if jax.process_count() > 1:
            raise InputError(
                f"SharedGritLM runs in one process, but there are {jax.process_count()}: use GritLM"
            )
        scaling = model.config.rope_scaling
        if scaling is not None and scaling.depends_on_length:
            raise InputError(
                "SharedGritLM reads prompts in chunks, but keys with rope_type="
                f"{scaling.rope_type!r} depend on the length of the prompt: use GritLM"
            )
        self._config, self._shards = model.config, batch_shards(mesh)
        self._num_pages = round_up(cache_tokens, PAGE_SIZE) // PAGE_SIZE
        self._max_running = max_running
        self._programs = PagedPrograms(model, mesh, end_tokens, self._num_pages, PAGE_SIZE)
        self.scheduler = self._new_scheduler()
        self._numbers = itertools.count()
        self._active: dict[TokenSequence, Generation] = {}
        # Shared with other threads, under the lock of `_changed`.
        self._changed = threading.Condition()
        self._submitted: list[Generation] = []
        self._calls: deque[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = deque()
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, name="grit-jax engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # A thread that uses the devices at exit may crash.

    def submit(
        self, request: Request, result: GenerationResult, max_steps: int = MAX_STEPS
    ) -> Generation:
        """Adds a request with one prompt, and returns at once.

        The result is that of `Generator` for the same request, whatever else is running.

        Args:
          request: the prompt and how to continue it.
          result: collects the tokens.
          max_steps: tokens that may be generated before their text is delivered.

        Raises:
          InputError: the cache could never hold the request's tokens, or the request's own cache
            is not one of this model.
          RuntimeError: the engine is closed.
        """
        (prompt,), (index,) = request.prompts, request.indices
        cache = None if request.caches is None else request.caches[0]
        if cache is not None:
            self._check_cache(cache, f"the cache of prompt {index}")
        sequence = TokenSequence(
            number=next(self._numbers),
            tokens=prompt.tolist(),
            max_new_tokens=request.max_new_tokens,
            cached_pages=() if cache is None else page_contents(cache),
            num_cached=0 if cache is None else cache.num_slots,
        )
        needed = sequence.length + sequence.max_new_tokens
        if self.scheduler.pages_for(needed) > self._num_pages:
            raise InputError(
                f"prompt {index} needs {needed} tokens of memory, with its cache and "
                f"max_new_tokens={sequence.max_new_tokens}, but there are "
                f"{self._num_pages * PAGE_SIZE}: shorten it, lower max_new_tokens, or raise "
                "cache_tokens"
            )
        generation = Generation(request, result, sequence, max_steps, self._wake)
        with self._changed:
            self._check_open()
            self._submitted.append(generation)
            self._changed.notify()
        return generation

    def run[Item](self, call: Callable[[], Item]) -> Item:
        """Runs a function that uses the devices in a turn of its own, and returns its result.

        Raises:
          RuntimeError: the engine is closed.
        """
        future: concurrent.futures.Future[Item] = concurrent.futures.Future()
        with self._changed:
            self._check_open()
            self._calls.append((call, future))
            self._changed.notify()
        return future.result()

    def in_turns[Item](self, calls: Iterator[Item]) -> Iterator[Item]:
        """Yields the items of an iterator, each of which is computed in a turn of its own."""
        end = object()
        while (item := self.run(lambda: next(calls, end))) is not end:
            yield item  # type: ignore

    def compile(self, num_sequences: int, num_tokens: int, sampling: Sampling) -> None:
        """Compiles the programs that generate for up to `num_sequences` requests at once.

        Args:
          num_sequences: number of requests.
          num_tokens: maximum tokens of a request, new ones included.
          sampling: how tokens are chosen; only whether it is `GREEDY` matters.
        """
        widths = {pages_per_row(tokens, PAGE_SIZE) for tokens in range(1, num_tokens + 1)}
        counts = [count for count in row_counts(self._max_running) if count < num_sequences]
        counts = [*counts, self._rows_to_decode(num_sequences)]
        reads = {(self._num_rows(1), length) for length in READ_SHAPES}
        if num_sequences > 1:
            reads |= {(self._rows_to_read(length), length) for length in READ_SHAPES}

        def rows(count: int, row_pages: int) -> Rows:
            return self._rows([], count, row_pages * PAGE_SIZE, sampling)

        for row_pages in sorted(widths):
            for count in dict.fromkeys(map(self._num_rows, counts)):
                tokens = np.zeros(count, np.int32)
                decode = functools.partial(self._programs.decode, rows(count, row_pages), tokens, 1)
                self.run(decode)
            for count, length in sorted(reads):
                tokens, batch = np.zeros((count, length), np.int32), rows(count, row_pages)
                none = np.zeros(count, np.int32)
                self.run(functools.partial(self._programs.read, batch, tokens, none))

    def close(self) -> None:
        """Cancels all requests and ends the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        atexit.unregister(self.close)

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the engine is closed: make another")

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(PagePool(self._num_pages), PAGE_SIZE, self._max_running)

    def _serve(self) -> None:
        try:
            while self._serve_turn():
                pass
        finally:
            with self._changed:
                self._is_closed = True
            for generation in [*self._active.values(), *self._submitted]:
                generation.fail(None)
            for _, future in self._calls:
                future.cancel()

    def _serve_turn(self) -> bool:
        """Waits for work and does a turn of it; returns False if the engine is closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or self._submitted or self._calls or self._active
            )
            if self._is_closed:
                return False
            submitted, self._submitted = self._submitted, []
            call = self._calls.popleft() if self._calls else None
        for generation in submitted:
            self._active[generation.sequence] = generation
            self.scheduler.add(generation.sequence)
        for generation in [each for each in self._active.values() if each.is_cancelled]:
            self._end(generation)
            generation.fail(None)
        if call is not None:
            _run_call(*call)
        try:
            self._start_waiting()
            self._read()
            self._decode()
        except Exception as error:
            self._fail_all(error)
        return True

    def _start_waiting(self) -> None:
        while (sequence := self.scheduler.start()) is not None:
            if sequence.num_read >= sequence.num_cached:
                continue
            caches = self._active[sequence].request.caches
            assert caches is not None
            keys, values = (np.asarray(part)[:, 0] for part in (caches[0].keys, caches[0].values))
            first = sequence.num_read // PAGE_SIZE
            pages = sequence.pages[first : self.scheduler.pages_for(sequence.num_cached)]
            slots = slice(sequence.num_read, None)
            self._programs.load(pages, keys[:, slots], values[:, slots])
            self.scheduler.advance(sequence, sequence.num_cached - sequence.num_read)

    def _read(self) -> None:
        sequences, length = self.scheduler.sequences_to_read()
        if not sequences:
            return
        count = self._num_rows(1) if len(sequences) == 1 else self._rows_to_read(length)
        tokens, num_tokens = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
        for row, sequence in enumerate(sequences):
            chunk = sequence.next_tokens(length)
            tokens[row, : len(chunk)], num_tokens[row] = chunk, len(chunk)
        longest = max(
            sequence.num_read + int(num)
            for sequence, num in zip(sequences, num_tokens, strict=False)
        )
        chosen = self._programs.read(self._rows(sequences, count, longest), tokens, num_tokens)
        for sequence, num, token in zip(sequences, num_tokens, chosen, strict=False):
            is_whole = num == sequence.num_pending
            self._advance(sequence, int(num), [int(token)] if is_whole else [])

    def _decode(self) -> None:
        steps = min((each.max_steps for each in self._active.values()), default=1)
        reading = any(sequence.num_pending > 1 for sequence in self.scheduler.running)
        if reading or self.scheduler.waiting or self._submitted or self._calls:
            steps = min(steps, SHORT_STEPS)
        sequences, steps = self.scheduler.sequences_to_decode(steps)
        if not sequences:
            return
        count = self._rows_to_decode(len(sequences))
        tokens = np.zeros(count, np.int32)
        for row, sequence in enumerate(sequences):
            tokens[row] = sequence.tokens[-1]
        longest = max(sequence.num_read + steps for sequence in sequences)
        longest = min(longest, self._num_pages * PAGE_SIZE)
        generated = self._programs.decode(self._rows(sequences, count, longest), tokens, steps)
        for sequence, new in zip(sequences, generated.tolist(), strict=False):
            new = [token for token in new if token != NO_TOKEN]
            self._advance(sequence, len(new), new)

    def _rows_to_decode(self, num_sequences: int) -> int:
        counts = row_counts(self._max_running)
        return self._num_rows(next((n for n in counts if n >= num_sequences), counts[-1]))

    def _rows_to_read(self, length: int) -> int:
        return self._num_rows(min(READ_SHAPES[length], self._max_running))

    def _num_rows(self, count: int) -> int:
        return round_up(count, self._shards)

    def _rows(
        self,
        sequences: Sequence[TokenSequence],
        count: int,
        num_tokens: int,
        padding_sampling: Sampling = GREEDY,
    ) -> Rows:
        """Returns `count` rows, the first of which are the sequences, of up to `num_tokens`."""
        row_pages = pages_per_row(num_tokens, PAGE_SIZE)
        generations = [self._active[sequence] for sequence in sequences]
        requests = [generation.request for generation in generations]
        padding = count - len(sequences)

        def column(values: Sequence[int], dtype: Any = np.int32) -> np.ndarray:
            return np.array([*values, *[0] * padding], dtype)

        page_table = np.zeros((count, row_pages), np.int32)
        history = np.full((count, row_pages * PAGE_SIZE), -1, np.int32)
        for row, (sequence, request) in enumerate(zip(sequences, requests, strict=True)):
            pages = sequence.pages[:row_pages]
            page_table[row, : len(pages)] = pages
            if request.sampling.repetition_penalty is not None:
                tokens = sequence.tokens[: history.shape[1]]
                history[row, : len(tokens)] = tokens
        sampling = [*(request.sampling for request in requests), *[padding_sampling] * padding]
        return Rows(
            page_table=page_table,
            lengths=column([sequence.num_read for sequence in sequences]),
            history=history,
            seeds=column([request.seed for request in requests], np.uint32),
            indices=column([request.indices[0] for request in requests], np.uint32),
            num_new=column([sequence.num_new for sequence in sequences]),
            max_new_tokens=column([sequence.max_new_tokens for sequence in sequences]),
            sampling=None if set(sampling) == {GREEDY} else RowSampling.stack(sampling),
        )

    def _advance(self, sequence: TokenSequence, num_read: int, new_tokens: list[int]) -> None:
        """Records a call's tokens, and ends the request if they are its last."""
        generation = self._active[sequence]
        if NOT_FINITE in new_tokens:
            self._empty_pages(sequence)
            self._end(generation)
            generation.fail(NotFiniteError(f"prompt {generation.request.indices[0]}"))
            return
        self.scheduler.advance(sequence, num_read, new_tokens)
        generation.deliver(new_tokens)
        if generation.result_so_far.is_ended or sequence.num_remaining == 0:
            self._end(generation)
            generation.finish()

    def _empty_pages(self, sequence: TokenSequence) -> None:
        """Writes zeros to the pages of a sequence that nobody shares.

        Attention multiplies the values of unused slots by 0, which must not give NaN.
        """
        pool = self.scheduler.pool
        pool.forget(sequence.pages)
        self._programs.load([page for page in sequence.pages if pool.num_users(page) == 1])

    def _end(self, generation: Generation) -> None:
        del self._active[generation.sequence]
        self.scheduler.remove(generation.sequence)

    def _fail_all(self, error: Exception) -> None:
        """Ends all requests with an error, after which the contents of the pages are lost."""
        failed, self._active = list(self._active.values()), {}
        self.scheduler = self._new_scheduler()
        self._programs.clear()
        for generation in failed:
            generation.fail(error)

    def _check_cache(self, cache: KVCache, name: str) -> None:
        L, B, T, K, H = cache.keys.shape
        config = self._config
        expected = (config.num_hidden_layers, 1, config.num_key_value_heads, config.head_dim)
        if expected != (L, B, K, H):
            raise InputError(
                f"{name} has {L} layers, {B} rows and {K} heads of size {H}, but this model takes "
                f"{expected[0]}, {expected[1]}, {expected[2]} and {expected[3]}: encode the text "
                "again"
            )
        is_plain = np.array_equal(cache.positions[0], np.arange(T)) and np.all(cache.segment_ids)
        if not is_plain:
            raise InputError(
                f"{name} has padding, or positions that do not count from 0: pass a cache of "
                "encode(..., get_cache=True)"
            )


def page_contents(cache: KVCache) -> list[bytes]:
    """Returns a hash of the keys and values of each page of a ready-made cache."""
    keys, values = (np.asarray(part)[:, 0] for part in (cache.keys, cache.values))
    contents = []
    for start in range(0, cache.num_slots, PAGE_SIZE):
        slots = slice(start, start + PAGE_SIZE)
        digest = hashlib.blake2b(digest_size=16)
        for part in (keys, values):
            digest.update(np.ascontiguousarray(part[:, slots]).view(np.uint8))
        contents.append(digest.digest())
    return contents


def _run_call(call: Callable[[], Any], future: concurrent.futures.Future[Any]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
