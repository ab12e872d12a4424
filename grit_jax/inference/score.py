"""Scores continuations of prompts: packed rows, with logits only where they are needed.

Legend of dimensions: C continuations, B rows, S positions, N scored tokens of a row.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float64, Int
import numpy as np

from grit_jax.data.packing import pack
from grit_jax.inference.batch_packing import PackedCall, plan_calls
from grit_jax.inference.compilation_notice import CompilationNotice
from grit_jax.inference.prompt_encoder import InputError, PromptEncoder, TextLike, as_list
from grit_jax.models import Decoder
from grit_jax.sharding import batch_shards, shard_rows
from grit_jax.text.examples import Text

# Scored tokens of each row whose logits exist at the same time.
LOGITS_CHUNK = 32


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A prompt and a text that may follow it.

    Attributes:
      prompt: token ids of the prompt, at least one.
      tokens: token ids of the continuation, at least one.
    """

    prompt: Int[np.ndarray, " prompt_tokens"]
    tokens: Int[np.ndarray, " tokens"]

    @property
    def input_tokens(self) -> Int[np.ndarray, " input_tokens"]:
        """The model's input: all tokens except the last."""
        return np.concatenate([self.prompt, self.tokens[:-1]]).astype(np.int32)


def as_continuations(
    encoder: PromptEncoder,
    prompts: Sequence[TextLike],
    continuations: Sequence[TextLike],
    context_length: int,
    *,
    add_bos: bool,
) -> list[Continuation]:
    """Returns the tokenized pairs of `GritLM.score`.

    Args:
      encoder: tokenizes and checks the texts.
      prompts: strings or token ids.
      continuations: one for each prompt.
      context_length: maximum tokens that the model supports.
      add_bos: whether to begin prompts that are strings with `<s>`, if the tokenizer does.

    Raises:
      InputError: see `GritLM.score`.
    """
    prompts, continuations = as_list(prompts, "prompts"), as_list(continuations, "continuations")
    if len(prompts) != len(continuations):
        raise InputError(
            f"there are {len(continuations)} continuations for {len(prompts)} prompts: give one "
            "for each prompt"
        )
    pairs = []
    for index, (prompt, text) in enumerate(zip(prompts, continuations, strict=True)):
        pair = _continuation(encoder, prompt, text, index, add_bos)
        if len(pair.input_tokens) > context_length:
            raise InputError(
                f"prompt and continuation {index} have {len(pair.input_tokens) + 1} tokens, but "
                f"this model supports {context_length}: shorten the prompt"
            )
        pairs.append(pair)
    return pairs


def _continuation(
    encoder: PromptEncoder, prompt: TextLike, text: TextLike, index: int, add_bos: bool
) -> Continuation:
    name = f"continuation {index}"
    prompt_ids = encoder.encode(prompt, add_bos=add_bos, name=f"prompt {index}").tokens
    if isinstance(prompt, str) and isinstance(text, str):
        pair = encoder.encode_pair(prompt, text, add_bos=add_bos, name=name)
        prompt_ids, tokens = pair.tokens[~pair.mask], pair.tokens[pair.mask]
    elif isinstance(prompt, str) or isinstance(text, str):
        raise InputError(f"prompt and {name} must both be strings, or both token ids")
    else:
        tokens = encoder.encode(text, add_bos=False, name=name).tokens
    if not len(tokens):
        raise InputError(f"{name} adds no token to its prompt: leave it out")
    if not len(prompt_ids):
        raise InputError(
            f"prompt and {name} begin with the same token, so there is nothing to predict it from: "
            "use a longer prompt, or begin it with a token (token ids, or add_special_tokens=True)"
        )
    return Continuation(prompt_ids, tokens)


@dataclasses.dataclass(frozen=True)
class _Targets:
    """The tokens to score in the rows of a call.

    Attributes:
      owners: index of the continuation that a target belongs to; -1 for padding.
      positions: position whose logits predict the target.
      token_ids: the targets.
    """

    owners: Int[np.ndarray, "B N"]
    positions: Int[np.ndarray, "B N"]
    token_ids: Int[np.ndarray, "B N"]


class Scorer:
    """Scores continuations with a model on a mesh.

    Args:
      model: model with its parameters on the mesh.
      mesh: the devices over which rows are split.
      in_turns: see `Encoder`.

    Attributes:
      parameters: the first argument of `program`.
      program: compiled program that scores the targets of packed rows.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        in_turns: Callable[[Iterator[Any]], Iterator[Any]] = iter,
    ):
        self._graph, self.parameters = nnx.split(model)
        self._mesh, self._in_turns = mesh, in_turns
        self._notice = CompilationNotice()
        self.program = jax.jit(self._score_rows)

    def score(
        self,
        continuations: Sequence[Continuation],
        tokens_per_device: int,
        on_progress: Callable[[int], None],
    ) -> tuple[Float64[np.ndarray, " C"], Bool[np.ndarray, " C"]]:
        """Returns the log-likelihood of each continuation in nats, and whether it is greedy.

        A continuation is greedy if each of its tokens is the most likely one. Continuations with
        the same input share it: scoring the answers A, B, C and D to a question costs as much as
        scoring one.

        Args:
          continuations: prompts with their continuations.
          tokens_per_device: maximum tokens of a call on one device, padding included.
          on_progress: called with the number of continuations that each call has scored.
        """
        log_likelihoods = np.zeros(len(continuations))
        is_greedy = np.ones(len(continuations), bool)
        calls = self._calls(continuations, tokens_per_device)
        for target_owners, scores, are_best in self._in_turns(calls):
            is_target = target_owners >= 0
            owners = target_owners[is_target]
            np.add.at(log_likelihoods, owners, scores[is_target])
            np.logical_and.at(is_greedy, owners, are_best[is_target])
            on_progress(len(np.unique(owners)))
        return log_likelihoods, is_greedy

    def _calls(
        self, continuations: Sequence[Continuation], tokens_per_device: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields the owners of the targets of each call, their scores, and which are best."""
        texts, owners_of_text = _unique_inputs(continuations)
        lengths = [len(text) for text in texts]
        for call in plan_calls(lengths, batch_shards(self._mesh), tokens_per_device):
            targets = _targets(call, texts, owners_of_text, continuations)
            packed = pack(texts, call.rows, call.num_rows, call.row_length, call.max_texts)
            rows = (packed.tokens, packed.positions, packed.segment_ids)
            rows = shard_rows((*rows, targets.positions, targets.token_ids), self._mesh)
            purpose = f"scores {call.num_rows} x {call.row_length} tokens"
            width = targets.positions.shape[1]
            with jax.set_mesh(self._mesh), self._notice.around(purpose, width):
                scores, are_best = jax.device_get(self.program(self.parameters, *rows))
            yield targets.owners, scores, are_best

    def _score_rows(
        self,
        parameters: Any,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        target_positions: Int[Array, "B N"],
        targets: Int[Array, "B N"],
    ) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
        """Returns the log-likelihood of each target, and whether it is the most likely token."""
        model = nnx.merge(self._graph, parameters)
        hidden = model(tokens, positions, segment_ids, is_causal=True)

        def score_chunk(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
            positions, targets = chunk
            predicting = jnp.take_along_axis(hidden, positions[..., None], axis=1)
            logits = model.logits(predicting).astype(jnp.float32)
            own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            is_best = jnp.argmax(logits, axis=-1) == targets
            return own - jax.nn.logsumexp(logits, axis=-1), is_best

        def chunked(array: Array) -> Array:
            """[B, N] -> [N / LOGITS_CHUNK, B, LOGITS_CHUNK]"""
            return jnp.moveaxis(array.reshape(len(array), -1, LOGITS_CHUNK), 1, 0)

        scores = jax.lax.map(score_chunk, (chunked(target_positions), chunked(targets)))
        return jax.tree.map(
            lambda chunks: jnp.moveaxis(chunks, 0, 1).reshape(targets.shape), scores
        )


def _unique_inputs(continuations: Sequence[Continuation]) -> tuple[list[Text], list[list[int]]]:
    """Returns the distinct inputs, and the indices of the continuations that share each."""
    owners: dict[bytes, list[int]] = {}
    for index, continuation in enumerate(continuations):
        owners.setdefault(continuation.input_tokens.tobytes(), []).append(index)
    inputs = [np.frombuffer(content, np.int32) for content in owners]
    return [Text(tokens, np.ones(len(tokens), bool)) for tokens in inputs], list(owners.values())


def _targets(
    call: PackedCall,
    texts: Sequence[Text],
    owners_of_text: Sequence[Sequence[int]],
    continuations: Sequence[Continuation],
) -> _Targets:
    """Returns the targets of a call's rows; N is `LOGITS_CHUNK` times a power of two."""
    rows: list[list[tuple[int, int, int]]] = []
    for row in call.rows:
        targets, end = [], 0
        for text in row:
            end += len(texts[text])
            for owner in owners_of_text[text]:
                tokens = continuations[owner].tokens.tolist()
                positions = range(end - len(tokens), end)
                targets += [(owner, *one) for one in zip(positions, tokens, strict=True)]
        rows.append(targets)
    width = LOGITS_CHUNK
    while width < max(map(len, rows)):
        width *= 2
    arrays = np.zeros((3, call.num_rows, width), np.int32)
    arrays[0] = -1
    for row, targets in enumerate(rows):
        arrays[:, row, : len(targets)] = np.transpose(targets)
    return _Targets(*arrays)
