"""Decides which requests the next calls of the model serve, and which pages their tokens get.

Everything here is on the host, and nothing depends on the time: the same submissions and results
give the same decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib

import numpy as np

from grit_jax.arithmetic import ceil_div
from grit_jax.inference.page_pool import PagePool

# Tokens of a prompt that one call reads, and how many prompts it reads together. No call reads more
# than 512 tokens on a device, so that decoding does not wait for long.
READ_SHAPES = {32: 8, 128: 4, 512: 1}


@dataclasses.dataclass(eq=False)
class TokenSequence:
    """The tokens of a request: those of a ready-made cache, the prompt, and the new ones.

    Attributes:
      number: sequences with lower numbers are older.
      tokens: the tokens of the prompt, then the new ones.
      max_new_tokens: maximum number of new tokens.
      cached_pages: for each page of the ready-made cache, the bytes that identify its content; the
        last page may be incomplete.
      num_cached: number of tokens in the ready-made cache.
      num_new: number of new tokens so far.
      pages: the pages of the first tokens; empty unless the sequence is running.
      num_read: number of first tokens whose keys and values are in the pages.
      last_turn: turn in which the sequence started or a chunk of it was read last.
    """

    number: int
    tokens: list[int]
    max_new_tokens: int
    cached_pages: Sequence[bytes] = ()
    num_cached: int = 0
    num_new: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    num_read: int = 0
    last_turn: int = 0
    _contents: list[bytes] = dataclasses.field(default_factory=list, init=False)

    @property
    def length(self) -> int:
        """Number of all tokens."""
        return self.num_cached + len(self.tokens)

    @property
    def num_pending(self) -> int:
        """Number of tokens that the model has not read. The next token follows the last of them."""
        return self.length - self.num_read

    @property
    def num_remaining(self) -> int:
        """Number of tokens that may still be generated."""
        return self.max_new_tokens - self.num_new

    def next_tokens(self, count: int) -> list[int]:
        """Returns the first `count` tokens that the model has not read."""
        start = self.num_read - self.num_cached
        return self.tokens[start : start + count]

    def content(self, index: int, page_size: int) -> bytes:
        """Returns what identifies the content of a full page: a hash of all tokens to its end."""
        while len(self._contents) <= index:
            number = len(self._contents)
            digest = hashlib.blake2b(self._contents[-1] if number else b"", digest_size=16)
            if number < len(self.cached_pages):
                digest.update(self.cached_pages[number])
            start = max(0, number * page_size - self.num_cached)
            stop = max(0, (number + 1) * page_size - self.num_cached)
            digest.update(np.array(self.tokens[start:stop], np.int32).tobytes())
            self._contents.append(digest.digest())
        return self._contents[index]


class Scheduler:
    """Serves sequences from a pool of pages, the oldest first.

    - Sequences start in the order of their numbers. The first that waits starts when the pages that
      are free hold all its tokens, and one more page for each running sequence.
    - Prompts are read in chunks, in turns: first those whose last turn is longest ago.
    - All sequences whose prompts are read generate together.
    - If there is no page for the next token, the youngest running sequence waits again: its pages
      are released, and all its tokens, new ones included, are read again later. The oldest never
      waits, so all sequences finish.

    Args:
      pool: the pages.
      page_size: number of tokens in a page.
      max_running: maximum number of running sequences.

    Attributes:
      pool: the pages.
      page_size: number of tokens in a page.
      waiting: sequences without pages, the oldest first.
      running: sequences with pages, the oldest first.
      num_preempted: how often a running sequence had to wait again.
    """

    def __init__(self, pool: PagePool, page_size: int, max_running: int):
        self.pool, self.page_size, self.max_running = pool, page_size, max_running
        self.waiting: list[TokenSequence] = []
        self.running: list[TokenSequence] = []
        self.num_preempted = 0
        self._turn = 0

    def pages_for(self, length: int) -> int:
        """Returns the number of pages that hold `length` tokens."""
        return ceil_div(length, self.page_size)

    def add(self, sequence: TokenSequence) -> None:
        """Adds a sequence that the pool can hold alone."""
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda each: each.number)

    def remove(self, sequence: TokenSequence) -> None:
        """Removes a sequence that has ended or is no longer wanted, and releases its pages."""
        if sequence in self.running:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)

    def start(self) -> TokenSequence | None:
        """Gives pages to the sequence that has waited longest, if there are enough.

        Returns:
          The sequence. The caller loads the pages of its ready-made cache from `num_read` on, and
          then calls `advance`.
        """
        if not self.waiting or len(self.running) == self.max_running:
            return None
        sequence = self.waiting[0]
        shared = self._share_known_pages(sequence)
        count = self.pages_for(sequence.length + 1) - len(shared)
        if count + len(self.running) > self.pool.num_free:
            self.pool.release(shared)
            return None
        self.waiting.pop(0)
        sequence.pages = shared + self.pool.allocate(count)
        sequence.num_read = len(shared) * self.page_size
        sequence.last_turn = self._turn - 1
        self.running.append(sequence)
        self.running.sort(key=lambda each: each.number)
        return sequence

    def sequences_to_read(self) -> tuple[list[TokenSequence], int]:
        """Returns the sequences of which the next call reads a chunk, and the length of the chunk.

        Sequences with fewer tokens are padded. No sequence is returned if all prompts are read.
        """
        reading = [sequence for sequence in self.running if sequence.num_pending > 1]
        for sequence in reading:
            self._adopt_known_pages(sequence)
        reading = [sequence for sequence in reading if sequence.num_pending > 1]
        if not reading:
            return [], 0
        reading.sort(key=lambda each: each.last_turn)  # Stable: the older first.
        lengths = list(READ_SHAPES)
        fitting = (length for length in lengths if length >= reading[0].num_pending)
        length = next(fitting, lengths[-1])
        chosen = reading[: READ_SHAPES[length]]
        for sequence in chosen:
            sequence.last_turn = self._turn
        self._turn += 1
        return chosen, length

    def sequences_to_decode(self, steps: int) -> tuple[list[TokenSequence], int]:
        """Returns the sequences that generate next, and the number of their tokens.

        They have pages for these tokens; others may have lost theirs.

        Args:
          steps: maximum number of tokens; 1 if there are not enough pages for more.
        """
        decoding = [sequence for sequence in self.running if sequence.num_pending == 1]
        if sum(self._missing_pages(each, steps) for each in decoding) > self.pool.num_free:
            steps = 1
        for sequence in decoding:
            while sequence.pages and self._missing_pages(sequence, steps) > self.pool.num_free:
                self._preempt(self.running[-1])
            if sequence.pages:
                sequence.pages += self.pool.allocate(self._missing_pages(sequence, steps))
        return [sequence for sequence in decoding if sequence.pages], steps

    def advance(
        self, sequence: TokenSequence, num_read: int, new_tokens: Sequence[int] = ()
    ) -> None:
        """Records that the model has read tokens of a running sequence, and what it generated.

        Full pages are shared from now on.

        Args:
          sequence: the sequence.
          num_read: number of tokens read by the call.
          new_tokens: the tokens generated by the call.
        """
        first = sequence.num_read // self.page_size
        sequence.num_read += num_read
        sequence.tokens += new_tokens
        sequence.num_new += len(new_tokens)
        for index in range(first, sequence.num_read // self.page_size):
            content = sequence.content(index, self.page_size)
            self.pool.register(sequence.pages[index], content)

    def _missing_pages(self, sequence: TokenSequence, steps: int) -> int:
        steps = min(steps, sequence.num_remaining)
        return max(0, self.pages_for(sequence.num_read + steps) - len(sequence.pages))

    def _share_known_pages(self, sequence: TokenSequence) -> list[int]:
        """Returns the pages of the first tokens whose content is known already.

        The last token is read in any case, because the next one follows from it.
        """
        shared: list[int] = []
        for index in range((sequence.length - 1) // self.page_size):
            content = sequence.content(index, self.page_size)
            if not self.pool.holds(content):
                break
            shared.append(self.pool.share(content))
        return shared

    def _adopt_known_pages(self, sequence: TokenSequence) -> None:
        """Skips tokens that another sequence has read since this one started."""
        while sequence.num_read % self.page_size == 0:
            index = sequence.num_read // self.page_size
            if (index + 1) * self.page_size >= sequence.length:
                return
            content = sequence.content(index, self.page_size)
            if not self.pool.holds(content):
                return
            self.pool.release([sequence.pages[index]])
            sequence.pages[index] = self.pool.share(content)
            sequence.num_read += self.page_size

    def _preempt(self, sequence: TokenSequence) -> None:
        self.num_preempted += 1
        self._stop(sequence)
        self.add(sequence)

    def _stop(self, sequence: TokenSequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.pages)
        sequence.pages, sequence.num_read = [], 0
