"""Generation: one program prefills the KV cache with prompts, one decodes tokens.

Legend of dimensions: B rows, S positions, D hidden, V vocabulary, E end tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Key
import numpy as np

from grit_jax.arithmetic import bucket_size, round_up
from grit_jax.inference.cache_utils import place_cache, stack_caches
from grit_jax.inference.compilation_notice import CompilationNotice
from grit_jax.inference.loading import unstack_layers
from grit_jax.inference.sampling import Sampling, choose_tokens
from grit_jax.models import Decoder, KVCache
from grit_jax.pytree import pytree_dataclass
from grit_jax.sharding import batch_shards, shard_rows

# Prompts are left-padded to one of these lengths, or to a multiple of the last, which is the
# length of a chunk of prefill.
PREFILL_LENGTHS = (32, 128, 512)
# Caches have this many slots or a larger bucket size, so that few programs are compiled.
SLOT_MULTIPLE = 128
# Tokens that are decoded before the host checks which rows have ended.
DECODE_STEPS = 32
# Replaces the token if the logits of a row that has not ended are not finite.
NOT_FINITE = -1


@pytree_dataclass
class GenerationState:
    """The state of generation after each token.

    Attributes:
      cache: keys and values of all tokens except the last of each row.
      tokens: the last token of each row.
      count: number of tokens generated so far.
      is_done: whether each row has ended.
      keys: the random key of each row.
      seen: the tokens that occurred in each row; None without a repetition penalty.
    """

    cache: KVCache
    tokens: Int[Array, " B"]
    count: Int[Array, ""]
    is_done: Bool[Array, " B"]
    keys: Key[Array, " B"]
    seen: Bool[Array, "B V"] | None


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts to continue, and how.

    Attributes:
      prompts: the token ids of each prompt.
      indices: index of each prompt, from which its random key is derived.
      max_new_tokens: maximum tokens of each result.
      end_tokens: tokens that end a result.
      sampling: how tokens are chosen.
      seed: seed of the random keys.
      caches: a cache of one row to continue for each prompt, or None.
      num_rows: number of rows in the batch, at least the number of prompts.
    """

    prompts: Sequence[np.ndarray]
    indices: Sequence[int]
    max_new_tokens: int
    end_tokens: Sequence[int]
    sampling: Sampling
    seed: int
    caches: Sequence[KVCache] | None
    num_rows: int

    def select(self, members: Sequence[int], num_rows: int) -> Request:
        """Returns the request with only some of its prompts, in a batch of `num_rows`."""
        return dataclasses.replace(
            self,
            prompts=[self.prompts[member] for member in members],
            indices=[self.indices[member] for member in members],
            caches=None if self.caches is None else [self.caches[member] for member in members],
            num_rows=num_rows,
        )


class Generator:
    """Continues prompts with a model on a mesh.

    Args:
      model: model with its parameters on the mesh.
      mesh: the devices over which rows are split.

    Attributes:
      parameters: the first argument of both programs.
      prefill: compiled program that adds a chunk of the prompts to the cache.
      decode: compiled program that generates tokens.
    """

    def __init__(self, model: Decoder, mesh: Mesh):
        self._graph, self.parameters = nnx.split(unstack_layers(model, mesh))
        self._mesh = mesh
        scaling = model.config.rope_scaling
        # Keys of the first chunk would depend on the length of the others.
        self._reads_whole_prompts = scaling is not None and scaling.depends_on_length
        self._notice = CompilationNotice()
        self.prefill = jax.jit(self._prefill, donate_argnums=1, static_argnums=6)
        self.decode = jax.jit(self._decode, donate_argnums=1)
        self._empty_cache = jax.jit(model.make_cache, static_argnums=(0, 1))

    def tokens(
        self, request: Request, ended: Bool[np.ndarray, " B"], max_steps: int = DECODE_STEPS
    ) -> Iterator[Int[np.ndarray, "B S"]]:
        """Yields the next tokens of all prompts; tokens after the end of a row are undefined.

        Args:
          request: the prompts and how to continue them.
          ended: whether each row has ended, all False at first. It is updated in place; the caller
            may set entries to end further rows.
          max_steps: maximum tokens to decode before yielding.
        """
        num_prompts, end_tokens = len(ended), np.array(request.end_tokens, np.int32)
        with jax.set_mesh(self._mesh):
            state = self._start(request, end_tokens)
        count, tokens, num_slots = 1, state.tokens[:, None], state.cache.num_slots
        sampling_structure = jax.tree.structure(request.sampling)
        while True:
            is_done = np.asarray(state.is_done)
            ended |= is_done[:num_prompts]
            yield np.asarray(tokens)[:num_prompts]
            if count == request.max_new_tokens or ended.all():
                return
            updated = np.append(ended, is_done[num_prompts:])
            if (updated != is_done).any():
                state = dataclasses.replace(state, is_done=shard_rows(updated, self._mesh))
            steps = min(max_steps, DECODE_STEPS, request.max_new_tokens - count)
            purpose = f"generates after {len(is_done)} x {num_slots} tokens"
            with jax.set_mesh(self._mesh), self._notice.around(purpose, sampling_structure):
                tokens, state = self.decode(
                    self.parameters, state, np.int32(steps), end_tokens, request.sampling
                )
            tokens, count = np.asarray(tokens)[:, :steps], count + steps

    def compile(self, request: Request) -> None:
        """Compiles the programs of a request by generating its first two tokens."""
        # No token ends the request before the second.
        endless = dataclasses.replace(request, end_tokens=[NOT_FINITE] * len(request.end_tokens))
        tokens = self.tokens(endless, np.zeros(len(request.prompts), bool), max_steps=1)
        for _ in zip(range(2), tokens, strict=False):
            pass

    def _start(self, request: Request, end_tokens: Int[np.ndarray, " E"]) -> GenerationState:
        """Prefills the prompts and returns the state after the first token of each result."""
        num_rows = round_up(request.num_rows, batch_shards(self._mesh))
        tokens, is_token = pad_left(request.prompts, num_rows)
        width = tokens.shape[1]
        state = GenerationState(
            cache=self._initial_cache(request, num_rows, width),
            tokens=shard_rows(np.zeros(num_rows, np.int32), self._mesh),
            count=jnp.int32(0),
            is_done=shard_rows(~is_token.any(axis=1), self._mesh),
            keys=shard_rows(row_keys(request.seed, request.indices, num_rows), self._mesh),
            seen=self._seen_tokens(tokens, is_token, request.sampling),
        )
        length = width if self._reads_whole_prompts else PREFILL_LENGTHS[-1]
        for start in range(0, width, length):
            chunk = slice(start, start + length)
            is_last = chunk.stop >= width
            purpose = f"reads prompts of {num_rows} x {width} tokens"
            structure = jax.tree.structure(request.sampling)
            with self._notice.around(purpose, state.cache.num_slots, structure, is_last):
                state = self.prefill(
                    self.parameters,
                    state,
                    shard_rows(tokens[:, chunk], self._mesh),
                    shard_rows(is_token[:, chunk].astype(np.int32), self._mesh),
                    end_tokens,
                    request.sampling,
                    is_last,
                )
        return state

    def _initial_cache(self, request: Request, num_rows: int, width: int) -> KVCache:
        """Returns a cache with the request's caches and slots for prompts and results."""
        num_used = 0
        if request.caches is not None:
            num_used = max(cache.num_slots for cache in request.caches)
            num_used = round_up(num_used, SLOT_MULTIPLE)
        num_slots = bucket_size(num_used + width + request.max_new_tokens, SLOT_MULTIPLE)
        if request.caches is None:
            return self._empty_cache(num_rows, num_slots)
        return place_cache(stack_caches(request.caches, num_rows, num_slots, num_used), self._mesh)

    def _seen_tokens(
        self, tokens: Int[np.ndarray, "B S"], is_token: Bool[np.ndarray, "B S"], sampling: Sampling
    ) -> Bool[Array, "B V"] | None:
        if sampling.repetition_penalty is None:
            return None
        vocab_size = nnx.merge(self._graph, self.parameters).config.vocab_size
        seen = np.zeros((len(tokens), vocab_size), bool)
        seen[np.nonzero(is_token)[0], tokens[is_token]] = True
        return shard_rows(seen, self._mesh)

    def _prefill(
        self,
        parameters: Any,
        state: GenerationState,
        tokens: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        end_tokens: Int[Array, " E"],
        sampling: Sampling,
        is_last: bool,
    ) -> GenerationState:
        """Adds a chunk of the prompts to the cache; the last chunk yields the first tokens."""
        model = nnx.merge(self._graph, parameters)
        if not is_last:
            _, cache = model(tokens, segment_ids=segment_ids, cache=state.cache)
            return dataclasses.replace(state, cache=cache)
        return next_state(model, state, tokens, segment_ids, end_tokens, sampling)

    def _decode(
        self,
        parameters: Any,
        state: GenerationState,
        steps: Int[Array, ""],
        end_tokens: Int[Array, " E"],
        sampling: Sampling,
    ) -> tuple[Int[Array, "B steps"], GenerationState]:
        """Generates `steps` tokens for each row, or fewer if all rows end."""
        model = nnx.merge(self._graph, parameters)
        generated = jnp.zeros((len(state.tokens), DECODE_STEPS), jnp.int32)

        def generate_token(carry: tuple[Any, Any, GenerationState]) -> tuple[Any, Any, Any]:
            step, generated, state = carry
            is_active = (~state.is_done).astype(jnp.int32)
            state = next_state(
                model, state, state.tokens[:, None], is_active[:, None], end_tokens, sampling
            )
            return step + 1, generated.at[:, step].set(state.tokens), state

        def is_unfinished(carry: tuple[Any, Any, GenerationState]) -> Bool[Array, ""]:
            step, _, state = carry
            return (step < steps) & ~jnp.all(state.is_done)

        _, generated, state = jax.lax.while_loop(
            is_unfinished, generate_token, (0, generated, state)
        )
        return generated, state


def next_state(
    model: Decoder,
    state: GenerationState,
    tokens: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    end_tokens: Int[Array, " E"],
    sampling: Sampling,
) -> GenerationState:
    """Runs the model on tokens and chooses the token after the last position of each row."""
    hidden, cache = model(tokens, segment_ids=segment_ids, cache=state.cache)
    logits = model.logits(hidden[:, -1:])[:, 0]
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count)
    chosen = choose_tokens(logits, sampling, state.seen, keys)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(chosen)), chosen].set(True)
    is_nan = jnp.isnan(logits).any(axis=1) & ~state.is_done
    chosen = jnp.where(is_nan, NOT_FINITE, chosen)
    ends = jnp.any(chosen[:, None] == end_tokens, axis=1) | is_nan
    return GenerationState(cache, chosen, state.count + 1, state.is_done | ends, state.keys, seen)


def pad_left(
    prompts: Sequence[np.ndarray], num_rows: int
) -> tuple[Int[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
    """Returns left-padded prompts, and which positions hold a token.

    The length of a row is one of `PREFILL_LENGTHS`, or a multiple of the last.
    """
    width = prompt_widths(max(len(prompt) for prompt in prompts))[-1]
    tokens = np.zeros((num_rows, width), np.int32)
    is_token = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        is_token[row, width - len(prompt) :] = True
    return tokens, is_token


def prompt_widths(longest: int) -> list[int]:
    """Returns the widths of `pad_left` for prompts of up to `longest` tokens."""
    chunk = PREFILL_LENGTHS[-1]
    widths = [*PREFILL_LENGTHS, *range(2 * chunk, round_up(longest, chunk) + 1, chunk)]
    end = next(index for index, width in enumerate(widths) if width >= longest)
    return widths[: end + 1]


def row_keys(seed: int, indices: Sequence[int], num_rows: int) -> Key[Array, " B"]:
    """Returns the random key of each row, which depends on the index of its prompt alone."""
    padded = jnp.array([*indices, *[0] * (num_rows - len(indices))], jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), padded)
