"""`SharedGritLM`: one model that many threads use at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import functools
from typing import Any

from jaxtyping import Int
import numpy as np

from grit_jax.inference.encode import Encoder
from grit_jax.inference.engine import Engine
from grit_jax.inference.gritlm import STREAM_STEPS, GritLM
from grit_jax.inference.prompt_encoder import as_stop_strings, check_count
from grit_jax.inference.results import GenerationResult
from grit_jax.inference.sampling import Sampling
from grit_jax.inference.score import Scorer

# Tokens whose keys and values are kept by default.
CACHE_TOKENS = 16384
# Maximum tokens that one turn of the engine embeds or scores on a device, unless a row has more.
TOKENS_PER_TURN = 2048


class SharedGritLM(GritLM):
    """A `GritLM` whose methods may be called from many threads at once, on any mesh.

    Calls share the devices: prompts of all threads generate together, each joining and leaving when
    it likes, and calls that embed or score take turns with them. Results are those of `GritLM`.
    Prompts that begin with the same tokens share the memory for them, and are read once; so do
    prompts after the same `cache`.

    Closing the iterator of `stream` or `stream_chat` cancels it. `batch_size` has no effect on
    generation.

    Args:
      model: the model. Use only this object from now on if it is on several devices.
      cache_tokens: number of tokens, of all prompts and results together, whose keys and values are
        kept in memory. By default 16384, or the model's context if it is longer.
      max_running: maximum number of prompts that generate together; others wait.

    Attributes:
      engine: runs all calls.

    Raises:
      InputError: a number is not positive, or there are several processes.
      HeadError: the model does not generate.
    """

    def __init__(self, model: GritLM, *, cache_tokens: int | None = None, max_running: int = 32):
        super().__init__(model.model, model.mesh)
        self.embedding_spec = model.embedding_spec
        self._prompt_encoder, self._end_tokens = model._prompt_encoder, model._end_tokens
        if cache_tokens is None:
            cache_tokens = max(CACHE_TOKENS, self.model.config.max_position_embeddings)
        check_count("cache_tokens", cache_tokens)
        check_count("max_running", max_running)
        self.engine = Engine(
            self.model,
            self.mesh,
            self._end_tokens,
            cache_tokens=cache_tokens,
            max_running=max_running,
        )

    def close(self) -> None:
        """Cancels all calls and ends the engine's thread."""
        self.engine.close()

    def __enter__(self) -> SharedGritLM:
        """Returns itself; `close` is called at the end of a `with` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Calls `close`."""
        self.close()

    def warm_up(
        self,
        batch_size: int = 1,
        max_length: int = 512,
        max_new_tokens: int = 256,
        *,
        sampling: Sampling | None = None,
    ) -> None:
        """Compiles the programs of later calls: see `GritLM.warm_up`.

        Args:
          batch_size: maximum number of texts that a later call embeds, and of prompts that generate
            together.
          max_length: maximum tokens of these texts and prompts.
          max_new_tokens: that of later calls of `generate` and `chat`; 0 compiles only `encode`.
          sampling: options of these calls. One program serves all options but greedy decoding
            without a penalty, which is another.
        """
        self.engine.run(lambda: GritLM.warm_up(self, batch_size, max_length, 0))
        check_count("max_new_tokens", max_new_tokens, 0)
        if max_new_tokens:
            longest = min(max_length + max_new_tokens, self.model.config.max_position_embeddings)
            self.engine.compile(batch_size, longest, sampling or Sampling())

    def _generate(
        self,
        prompts: Sequence[Int[np.ndarray, " _"]],
        are_strings: Sequence[bool],
        max_new_tokens: int,
        *,
        stop: str | Sequence[str] | None = (),
        batch_size: int = 32,
        **options: Any,
    ) -> list[GenerationResult]:
        check_count("batch_size", batch_size)
        stop = as_stop_strings(stop)
        request = self._request(prompts, max_new_tokens, **options)
        generations = []
        try:
            for member, is_string in enumerate(are_strings):
                result = self._result(is_string, stop)
                generations.append(self.engine.submit(request.select([member], 1), result))
            return [generation.result() for generation in generations]
        finally:  # After an error, the others are not wanted.
            for generation in generations:
                generation.cancel()

    def _stream(
        self,
        prompt: Int[np.ndarray, " tokens"],
        max_new_tokens: int,
        *,
        stop: str | Sequence[str] | None = (),
        **options: Any,
    ) -> Iterator[str]:
        result = self._result(True, as_stop_strings(stop))
        request = self._request([prompt], max_new_tokens, **options)
        generation = self.engine.submit(request, result, STREAM_STEPS)

        def pieces() -> Iterator[str]:
            try:
                yield from generation
            finally:
                generation.cancel()

        return pieces()

    def _tokens_per_device(self, batch_size: int, length: int) -> int:
        return min(TOKENS_PER_TURN, super()._tokens_per_device(batch_size, length))

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.model, self.mesh, self.engine.in_turns, calls_in_flight=0)

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.model, self.mesh, self.engine.in_turns)
