"""Collects generated tokens into results: where each ends, and its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxtyping import Int
import numpy as np

from grit_jax.inference.detokenizer import IncrementalDetokenizer
from grit_jax.inference.generate import NOT_FINITE, Generator, Request
from grit_jax.inference.prompt_encoder import InputError, check_count
from grit_jax.text.tokenizer import Tokenizer


class NotFiniteError(ArithmeticError):
    """The model's output is NaN or infinite; the message names the text and says what to do."""

    def __init__(self, name: str):
        super().__init__(
            f"the model's output for {name} is not finite: its weights are damaged or overflow; "
            'try dtype="float32", or another checkpoint'
        )


class GenerationResult:
    """The continuation of one prompt, up to an end token or a stop string.

    Args:
      end_tokens: tokens that end the result; they are not part of it.
      tokenizer: tokenizer that decodes the text, or None for token ids only.
      stop: strings at which the text ends; they are not part of it.

    Attributes:
      is_ended: whether an end token or a stop string has been generated.
    """

    def __init__(
        self, end_tokens: Sequence[int], tokenizer: Tokenizer | None, stop: Sequence[str] = ()
    ):
        self._end_tokens = end_tokens
        self._detokenizer = None if tokenizer is None else IncrementalDetokenizer(tokenizer, stop)
        self._ids: list[int] = []
        self.is_ended = False

    def push(self, tokens: Int[np.ndarray, " new"]) -> str:
        """Adds the next tokens, and returns the text that they complete."""
        text = ""
        for token in tokens.tolist():
            self.is_ended |= token in self._end_tokens
            if self.is_ended:
                break
            self._ids.append(token)
            if self._detokenizer is not None:
                text += self._detokenizer.push(token)
                self.is_ended = self._detokenizer.is_stopped
        return text

    def finish(self) -> str:
        """Returns the rest of the text after the last token."""
        return "" if self._detokenizer is None else self._detokenizer.finish()

    @property
    def text(self) -> str:
        """The text that `push` and `finish` have returned so far."""
        return "" if self._detokenizer is None else self._detokenizer.text

    @property
    def ids(self) -> Int[np.ndarray, " tokens"]:
        """The token ids so far, including those that complete a stop string."""
        return np.array(self._ids, np.int32)


def generate_results(
    generator: Generator, request: Request, results: Sequence[GenerationResult]
) -> None:
    """Generates until all results of a request have ended."""
    ended = np.zeros(len(results), bool)
    for tokens in generator.tokens(request, ended):
        for row, result in enumerate(results):
            _check_finite(tokens[row], request.indices[row])
            result.push(tokens[row])
            ended[row] |= result.is_ended
    for result in results:
        result.finish()


def stream_text(
    generator: Generator, request: Request, result: GenerationResult, max_steps: int
) -> Iterator[str]:
    """Yields the text of a request with one prompt, at most `max_steps` tokens at a time."""
    ended = np.zeros(1, bool)
    for tokens in generator.tokens(request, ended, max_steps):
        _check_finite(tokens[0], request.indices[0])
        if text := result.push(tokens[0]):
            yield text
        ended |= result.is_ended
    if text := result.finish():
        yield text


def _check_finite(tokens: Int[np.ndarray, " new"], index: int) -> None:
    if (tokens == NOT_FINITE).any():
        raise NotFiniteError(f"prompt {index}")


def check_fits_context(request: Request, context_length: int) -> None:
    """Checks that each prompt and its result fit the model's context.

    Raises:
      InputError: one does not fit, or the number of caches is not that of the prompts.
    """
    prompts, caches, max_new_tokens = request.prompts, request.caches, request.max_new_tokens
    if caches is not None and len(caches) != len(prompts):
        raise InputError(
            f"there are {len(caches)} caches for {len(prompts)} prompts: give one for each prompt"
        )
    check_count("max_new_tokens", max_new_tokens)
    for member, prompt in enumerate(prompts):
        num_cached = 0 if caches is None else int(caches[member].next_positions()[0])
        if num_cached + len(prompt) + max_new_tokens > context_length:
            after = f" after {num_cached} in its cache" if num_cached else ""
            raise InputError(
                f"prompt {request.indices[member]} has {len(prompt)} tokens{after}, which with "
                f"max_new_tokens={max_new_tokens} exceeds the model's context of "
                f"{context_length}: shorten it, or lower max_new_tokens"
            )


def batches_by_length(prompts: Sequence[np.ndarray], batch_size: int) -> list[list[int]]:
    """Returns the indices of the prompts in batches of prompts of similar length."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
