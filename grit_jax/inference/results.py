"""Answers as their tokens come: where each ends, and its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxtyping import Int
import numpy as np

from grit_jax.inference.detokenizer import IncrementalDetokenizer
from grit_jax.inference.generate import Generator, Request
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.text.tokenizer import Tokenizer


class GenerationResult:
    """What follows one prompt, up to a token or a string that ends it.

    Args:
      end_tokens: tokens that end an answer, and are no part of it.
      tokenizer: to make text of it; None to have token ids alone.
      stop: strings before which its text ends.
    """

    def __init__(
        self, end_tokens: Sequence[int], tokenizer: Tokenizer | None, stop: Sequence[str] = ()
    ):
        self._end_tokens = end_tokens
        self._pieces = None if tokenizer is None else IncrementalDetokenizer(tokenizer, stop)
        self._ids: list[int] = []
        self.is_ended = False

    def push(self, tokens: Int[np.ndarray, " new"]) -> str:
        """Adds the next tokens, and returns the text that is certain with them."""
        text = ""
        for token in tokens.tolist():
            self.is_ended |= token in self._end_tokens
            if self.is_ended:
                break
            self._ids.append(token)
            if self._pieces is not None:
                text += self._pieces.push(token)
                self.is_ended = self._pieces.is_stopped
        return text

    def finish(self) -> str:
        """Returns the rest of the text; no token comes after."""
        return "" if self._pieces is None else self._pieces.finish()

    @property
    def text(self) -> str:
        """The text so far, which is certain."""
        return "" if self._pieces is None else self._pieces.text

    @property
    def ids(self) -> Int[np.ndarray, " tokens"]:
        """The tokens so far, with those that complete a stop string."""
        return np.array(self._ids, np.int32)


def complete(generator: Generator, request: Request, answers: Sequence[GenerationResult]) -> None:
    """Continues the prompts of a request until all their answers have ended."""
    ended = np.zeros(len(answers), bool)
    for tokens in generator.tokens(request, ended):
        for row, answer in enumerate(answers):
            answer.push(tokens[row])
            ended[row] |= answer.is_ended
    for answer in answers:
        answer.finish()


def pieces(
    generator: Generator, request: Request, answer: GenerationResult, tokens_at_once: int
) -> Iterator[str]:
    """Yields the text of the answer to a request's one prompt, as it is made."""
    ended = np.zeros(1, bool)
    for tokens in generator.tokens(request, ended, tokens_at_once):
        if piece := answer.push(tokens[0]):
            yield piece
        ended |= answer.is_ended
    if piece := answer.finish():
        yield piece


def check_room(request: Request, context: int) -> None:
    """Checks that prompts and answers fit the model's context, and that caches are theirs.

    Raises:
      InputError: one does not; the message names it.
    """
    prompts, caches, max_new_tokens = request.prompts, request.caches, request.max_new_tokens
    if caches is not None and len(caches) != len(prompts):
        raise InputError(
            f"there are {len(caches)} caches for {len(prompts)} prompts: give one each"
        )
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be positive")
    for place, prompt in enumerate(prompts):
        cached = 0 if caches is None else int(caches[place].next_positions()[0])
        if cached + len(prompt) + max_new_tokens > context:
            before = f" behind {cached} in its cache" if cached else ""
            raise InputError(
                f"prompt {request.numbers[place]} has {len(prompt)} tokens{before}, which with "
                f"max_new_tokens={max_new_tokens} is over the model's context of {context}: "
                "shorten it, or lower max_new_tokens"
            )


def in_batches(prompts: Sequence[np.ndarray], batch_size: int) -> list[list[int]]:
    """Returns the numbers of the prompts in batches, those of about the same length together."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
