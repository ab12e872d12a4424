"""The functions that `experiments.measure` asks for, of a GritLM.

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
    """A GritLM as `experiments.measure` asks for it.

    Args:
      model: the model.
      max_length: tokens of a text that is embedded; what is longer is cut.
      max_new_tokens: of an answer to a task.
    """

    def __init__(self, model: GritLM, *, max_length: int = 512, max_new_tokens: int = 48):
        self._model = model
        self._max_length, self._max_new_tokens = max_length, max_new_tokens

    def encode(self, texts: Sequence[str], instruction: str) -> Float[np.ndarray, "N D"]:
        """Returns the embeddings of texts with an instruction, or "" for none."""
        prefix = embedding_prefix(instruction)
        return self._model.encode(
            list(texts), instruction=prefix, max_length=self._max_length, truncate=True
        )

    def generate(self, questions: Sequence[str]) -> list[str]:
        """Returns the first line of the likeliest answer to each question."""
        prompts = [chat_prompt(question, is_first=True) for question in questions]
        return self._model.generate(prompts, max_new_tokens=self._max_new_tokens, stop="\n")

    def likelihoods(
        self, chats: Sequence[tuple[str, str]]
    ) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        """Returns the log-likelihood of each answer with its `</s>`, in nats, and its tokens.

        Raises:
          InputError: a chat is longer than the model's context.
        """
        # None is cut: bits are held against the bytes of whole answers.
        texts = [chat_text(self._model.tokenizer, chat, sys.maxsize) for chat in chats]
        starts = [int(np.argmax(text.mask)) for text in texts]
        nats, _ = self._model.score(
            [text.tokens[:start] for text, start in zip(texts, starts, strict=True)],
            [text.tokens[start:] for text, start in zip(texts, starts, strict=True)],
        )
        return nats, np.array([np.sum(text.mask) for text in texts], np.float64)
