"""Prompts to answers: one program reads a prompt into a cache, one makes tokens from there.

Legend of dimensions: B rows, S positions, D hidden, V vocabulary, E tokens that end a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Int, Key
import numpy as np

from grit_jax.arithmetic import ceil_div
from grit_jax.inference.cache_utils import cache_shardings, join_caches, unstack_layers
from grit_jax.inference.sampling import Sampling, choose_tokens
from grit_jax.models import Decoder, KVCache
from grit_jax.sharding import batch_shards, partition_spec

# Prompts are read in parts of one of these lengths, padded in front.
PART_LENGTHS = (32, 128, 512)
# A cache has a multiple of so many slots, so that few programs are compiled.
SLOTS = 128
# Tokens that are made before the host looks at them.
TOKENS_AT_ONCE = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where the answers are.

    Attributes:
      cache: all tokens but the last of each row.
      tokens: the last token of each row.
      count: tokens that have been made.
      is_done: rows that have ended.
      keys: what each row's tokens are drawn with.
      seen: the tokens that each row has had; None where nobody asks.
    """

    cache: KVCache
    tokens: Int[Array, " B"]
    count: Int[Array, ""]
    is_done: Bool[Array, " B"]
    keys: Key[Array, " B"]
    seen: Bool[Array, "B V"] | None


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts that are continued together.

    Attributes:
      prompts: the token ids of each.
      numbers: of the prompts; each draws its tokens with the seed and its own.
      max_new_tokens: of each answer.
      end_tokens: tokens that end an answer.
      sampling: how tokens are chosen.
      seed: of what is drawn.
      caches: what stands before each prompt; None for nothing.
      num_rows: rows to make room for, of which prompts may leave some empty.
    """

    prompts: Sequence[np.ndarray]
    numbers: Sequence[int]
    max_new_tokens: int
    end_tokens: Sequence[int]
    sampling: Sampling
    seed: int
    caches: Sequence[KVCache] | None
    num_rows: int

    def part(self, places: Sequence[int], num_rows: int) -> Request:
        """Returns the request of some of its prompts, for so many rows."""
        return dataclasses.replace(
            self,
            prompts=[self.prompts[place] for place in places],
            numbers=[self.numbers[place] for place in places],
            caches=None if self.caches is None else [self.caches[place] for place in places],
            num_rows=num_rows,
        )


class Generator:
    """Continues prompts with a model on a mesh.

    Args:
      model: its parameters lie on the mesh.
      mesh: rows are split over it.

    Attributes:
      parameters: what both programs are given first.
      prefill: the program that reads a part of the prompts.
      decode: the program that makes tokens.
    """

    def __init__(self, model: Decoder, mesh: Mesh):
        self._graph, self.parameters = nnx.split(unstack_layers(model, mesh))
        self._mesh = mesh
        self.prefill = jax.jit(self._read_part, donate_argnums=1, static_argnums=6)
        self.decode = jax.jit(self._make_tokens, donate_argnums=1)
        self._empty_cache = jax.jit(model.make_cache, static_argnums=(0, 1))

    def tokens(
        self, request: Request, ended: Bool[np.ndarray, " B"], at_once: int = TOKENS_AT_ONCE
    ) -> Iterator[Int[np.ndarray, "B S"]]:
        """Yields the next tokens of all prompts; what follows the end of an answer means nothing.

        Args:
          request: the prompts and how to continue them.
          ended: is told which answers have ended, and may end others; at first none.
          at_once: tokens that are made before they are yielded.
        """
        num_prompts, end_tokens = len(ended), np.array(request.end_tokens, np.int32)
        with jax.set_mesh(self._mesh):
            state = self._start(request, end_tokens)
        made, tokens = 1, state.tokens[:, None]
        while True:
            known = np.asarray(state.is_done)
            ended |= known[:num_prompts]
            yield np.asarray(tokens)[:num_prompts]
            if made == request.max_new_tokens or ended.all():
                return
            is_done = np.append(ended, known[num_prompts:])
            if (is_done != known).any():
                state = dataclasses.replace(state, is_done=self._rows(is_done))
            steps = min(at_once, TOKENS_AT_ONCE, request.max_new_tokens - made)
            with jax.set_mesh(self._mesh):
                tokens, state = self.decode(
                    self.parameters, state, np.int32(steps), end_tokens, request.sampling
                )
            tokens, made = np.asarray(tokens)[:, :steps], made + steps

    def _start(self, request: Request, end_tokens: Int[np.ndarray, " E"]) -> State:
        """Reads the prompts, and returns the state after the first token of each answer."""
        num_rows = round_up(request.num_rows, batch_shards(self._mesh))
        tokens, is_token = pad_in_front(request.prompts, num_rows)
        width = tokens.shape[1]
        state = State(
            cache=self._cache_for(request, num_rows, width),
            tokens=self._rows(np.zeros(num_rows, np.int32)),
            count=jnp.int32(0),
            is_done=self._rows(~is_token.any(axis=1)),
            keys=self._rows(row_keys(request.seed, request.numbers, num_rows)),
            seen=self._seen(tokens, is_token, request.sampling),
        )
        for start in range(0, width, PART_LENGTHS[-1]):
            part = slice(start, start + PART_LENGTHS[-1])
            state = self.prefill(
                self.parameters,
                state,
                self._rows(tokens[:, part]),
                self._rows(is_token[:, part].astype(np.int32)),
                end_tokens,
                request.sampling,
                part.stop >= width,
            )
        return state

    def _cache_for(self, request: Request, num_rows: int, width: int) -> KVCache:
        """Returns a cache with room for prompts and answers, behind what caches hold already."""
        cached = 0
        if request.caches is not None:
            cached = round_up(max(cache.num_slots for cache in request.caches), SLOTS)
        num_slots = round_up(cached + width + request.max_new_tokens, SLOTS)
        if request.caches is None:
            return self._empty_cache(num_rows, num_slots)
        joined = join_caches(request.caches, num_rows, num_slots, cached)
        return jax.device_put(joined, cache_shardings(self._mesh))

    def _seen(
        self, tokens: np.ndarray, is_token: np.ndarray, sampling: Sampling
    ) -> jax.Array | None:
        if sampling.repetition_penalty is None:
            return None
        vocab_size = nnx.merge(self._graph, self.parameters).config.vocab_size
        seen = np.zeros((len(tokens), vocab_size), bool)
        seen[np.nonzero(is_token)[0], tokens[is_token]] = True
        return self._rows(seen)

    def _rows(self, array: Any) -> jax.Array:
        return jax.device_put(array, NamedSharding(self._mesh, partition_spec("batch")))

    def _read_part(
        self,
        parameters: Any,
        state: State,
        tokens: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        end_tokens: Int[Array, " E"],
        sampling: Sampling,
        is_last: bool,
    ) -> State:
        """Reads a part of the prompts, and after the last part chooses the first new tokens."""
        model = nnx.merge(self._graph, parameters)
        if not is_last:
            _, cache = model(tokens, segment_ids=segment_ids, cache=state.cache)
            return dataclasses.replace(state, cache=cache)
        return next_state(model, state, tokens, segment_ids, end_tokens, sampling)

    def _make_tokens(
        self,
        parameters: Any,
        state: State,
        steps: Int[Array, ""],
        end_tokens: Int[Array, " E"],
        sampling: Sampling,
    ) -> tuple[Int[Array, "B S"], State]:
        """Makes so many tokens for each row, fewer if all rows end."""
        model = nnx.merge(self._graph, parameters)
        made = jnp.zeros((len(state.tokens), TOKENS_AT_ONCE), jnp.int32)

        def make_token(carried: tuple[Any, Any, State]) -> tuple[Any, Any, State]:
            step, made, state = carried
            is_read = (~state.is_done).astype(jnp.int32)
            state = next_state(
                model, state, state.tokens[:, None], is_read[:, None], end_tokens, sampling
            )
            return step + 1, made.at[:, step].set(state.tokens), state

        def goes_on(carried: tuple[Any, Any, State]) -> Bool[Array, ""]:
            step, _, state = carried
            return (step < steps) & ~jnp.all(state.is_done)

        _, made, state = jax.lax.while_loop(goes_on, make_token, (0, made, state))
        return made, state


def next_state(
    model: Decoder,
    state: State,
    tokens: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    end_tokens: Int[Array, " E"],
    sampling: Sampling,
) -> State:
    """Reads tokens, and chooses the one that follows the last of each row."""
    hidden, cache = model(tokens, segment_ids=segment_ids, cache=state.cache)
    logits = model.logits(hidden[:, -1:])[:, 0]
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count)
    chosen = choose_tokens(logits, sampling, state.seen, keys)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(chosen)), chosen].set(True)
    ends = jnp.any(chosen[:, None] == end_tokens, axis=1)
    return State(cache, chosen, state.count + 1, state.is_done | ends, state.keys, seen)


def pad_in_front(
    prompts: Sequence[np.ndarray], num_rows: int
) -> tuple[Int[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
    """Returns prompts as rows that all end in the last place, and which places hold a token.

    The length of a row is one of `PART_LENGTHS`, or a multiple of the longest of those.
    """
    longest = max(len(prompt) for prompt in prompts)
    width = next((length for length in PART_LENGTHS if length >= longest), None)
    width = width or round_up(longest, PART_LENGTHS[-1])
    tokens = np.zeros((num_rows, width), np.int32)
    is_token = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        is_token[row, width - len(prompt) :] = True
    return tokens, is_token


def row_keys(seed: int, numbers: Sequence[int], num_rows: int) -> Key[Array, " B"]:
    """Returns the key of each row, by the number of its prompt: not by what is beside it."""
    padded = jnp.array([*numbers, *[0] * (num_rows - len(numbers))], jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), padded)


def round_up(number: int, multiple: int) -> int:
    """Returns the smallest multiple that is not below a number."""
    return ceil_div(number, multiple) * multiple
