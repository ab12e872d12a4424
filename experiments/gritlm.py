"""Adapts a GritLM to the functions that `experiments.measure` needs.

Legend of dimensions: N texts or chats, D embedding.
"""

from collections.abc import Sequence
import sys

from jaxtyping import Float
import numpy as np

from grit_jax import GritLM
from grit_jax.text.examples import chat_text
from grit_jax.text.templates import chat_prompt, embedding_prefix


class Measured:
    """A GritLM with the interface of `experiments.measure`.

    Args:
      model: the model.
      max_length: maximum tokens of an embedded text; longer texts are truncated.
      max_new_tokens: maximum tokens of an answer.
    """

    def __init__(self, model: GritLM, *, max_length: int = 512, max_new_tokens: int = 48):
        self._model = model
        self._max_length, self._max_new_tokens = max_length, max_new_tokens

    def encode(self, texts: Sequence[str], instruction: str) -> Float[np.ndarray, "N D"]:
        """Embeds texts with an instruction, or without one if it is ""."""
        prefix = embedding_prefix(instruction)
        return self._model.encode(
            list(texts), instruction=prefix, max_length=self._max_length, truncate=True
        )

    def generate(self, questions: Sequence[str]) -> list[str]:
        """Returns the first line of the greedy answer to each question."""
        prompts = [chat_prompt(question, is_first=True) for question in questions]
        return self._model.generate(prompts, max_new_tokens=self._max_new_tokens, stop="\n")

    def likelihoods(
        self, chats: Sequence[tuple[str, str]]
    ) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        """Returns log-likelihoods (nats) and token counts of the answers, `</s>` included.

        Raises:
          InputError: a chat is longer than the model's context.
        """
        # No truncation: bits are divided by the bytes of the full answer.
        texts = [chat_text(self._model.tokenizer, chat, sys.maxsize) for chat in chats]
        starts = [int(np.argmax(text.mask)) for text in texts]
        nats, _ = self._model.score(
            [text.tokens[:start] for text, start in zip(texts, starts, strict=True)],
            [text.tokens[start:] for text, start in zip(texts, starts, strict=True)],
        )
        return nats, np.array([np.sum(text.mask) for text in texts], np.float64)
