"""The functions that `experiments.measure` asks for, of a GritLM.

Legend of dimensions: N chats or texts, D embedding or hidden, B rows, S positions, K answer tokens.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from grit_jax import GritLM
from grit_jax.data.examples import Text, chat_text
from grit_jax.data.templates import chat_prompt, embedding_prefix
from grit_jax.sharding import batch_shards

# Rows have a multiple of so many positions, and of so many tokens of an answer, so that few
# programs are compiled.
ROW_LENGTH, TARGETS = 64, 32
# Positions that are read at once.
PLACES = 2048


class Measured:
    """A GritLM as `experiments.measure` asks for it.

    Args:
      model: the model.
      max_length: tokens of a text or a chat; what is longer is cut.
      max_new_tokens: of an answer to a task.
    """

    def __init__(self, model: GritLM, *, max_length: int = 512, max_new_tokens: int = 48):
        self._model = model
        self._max_length, self._max_new_tokens = max_length, max_new_tokens
        self._graph, self._parameters = nnx.split(model.model)
        self._log_likelihoods = jax.jit(self._of_batch)

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
    ) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
        """Returns the log-likelihood of each answer with its `</s>`, in nats, and its tokens."""
        tokenizer = self._model.tokenizer
        texts = [chat_text(tokenizer, chat, self._max_length) for chat in chats]
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        nats = np.zeros(len(texts))
        start = 0
        while start < len(order):
            numbers = order[start : start + self._num_rows(texts, order[start:])]
            nats[numbers] = self._read([texts[number] for number in numbers])
            start += len(numbers)
        return nats, np.array([np.sum(text.mask) for text in texts], np.float64)

    def _num_rows(self, texts: Sequence[Text], order: Sequence[int]) -> int:
        """Returns how many of the next texts, each longer than the last, are read at once."""
        num_rows = 1
        for number in order[1:]:
            if (num_rows + 1) * _multiple(len(texts[number]), ROW_LENGTH) > PLACES:
                break
            num_rows += 1
        return num_rows

    def _read(self, texts: Sequence[Text]) -> Float[np.ndarray, "N"]:
        S = _multiple(max(map(len, texts)), ROW_LENGTH)
        K = _multiple(max(int(text.mask.sum()) for text in texts), TARGETS)
        B = _multiple(max(1, PLACES // S), batch_shards(self._model.mesh))
        tokens, segment_ids = np.zeros((2, B, S), np.int32)
        places, targets = np.zeros((2, B, K), np.int32)
        is_target = np.zeros((B, K), bool)
        for row, text in enumerate(texts):
            tokens[row, : len(text)], segment_ids[row, : len(text)] = text.tokens, row + 1
            answer = np.flatnonzero(text.mask)
            # A token is foretold by the one before it.
            places[row, : len(answer)] = answer - 1
            targets[row, : len(answer)] = text.tokens[answer]
            is_target[row, : len(answer)] = True
        inputs = (tokens, segment_ids, places, targets, is_target)
        with jax.set_mesh(self._model.mesh):
            nats = self._log_likelihoods(self._parameters, *inputs)
        return np.asarray(nats)[: len(texts)]

    def _of_batch(
        self,
        parameters: Any,
        tokens: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        places: Int[Array, "B K"],
        targets: Int[Array, "B K"],
        is_target: Bool[Array, "B K"],
    ) -> Float[Array, "B"]:
        model = nnx.merge(self._graph, parameters)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = model(tokens, positions, segment_ids, is_causal=True)
        before = jnp.take_along_axis(hidden, places[..., None], axis=1)  # [B, K, D]
        log_probabilities = jax.nn.log_softmax(model.logits(before).astype(jnp.float32))
        own = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(own * is_target, axis=1)


def _multiple(length: int, unit: int) -> int:
    """The smallest multiple of the unit that is not smaller than the length."""
    return -(-length // unit) * unit
