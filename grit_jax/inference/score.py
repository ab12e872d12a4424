"""How likely a model finds continuations of prompts: packed rows, and few of their logits.

Legend of dimensions: C continuations, B rows, S positions, N scored places of a row.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Float64, Int
import numpy as np

from grit_jax.data.packing import pack
from grit_jax.inference.batch_packing import PackedCall, plan_calls
from grit_jax.inference.prompt_encoder import InputError, PromptEncoder, TextLike
from grit_jax.models import Decoder
from grit_jax.sharding import batch_shards, partition_spec
from grit_jax.text.examples import Text

# Scored places of each row whose logits exist at once.
PLACES_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What may follow a prompt.

    Attributes:
      prompt: token ids, at least one.
      tokens: the token ids that follow them, at least one.
    """

    prompt: Int[np.ndarray, " prompt_tokens"]
    tokens: Int[np.ndarray, " tokens"]

    @property
    def read(self) -> Int[np.ndarray, " read_tokens"]:
        """What the model reads to score it: all but the last token."""
        return np.concatenate([self.prompt, self.tokens[:-1]]).astype(np.int32)


def as_continuations(
    token_ids: PromptEncoder,
    prompts: Sequence[TextLike],
    continuations: Sequence[TextLike],
    context: int,
    *,
    begin: bool,
) -> list[Continuation]:
    """Returns pairs of a prompt and what may follow it; the arguments are those of `GritLM.score`.

    Raises:
      InputError: see there.
    """
    if isinstance(prompts, str) or isinstance(continuations, str):
        raise InputError("prompts and continuations are lists, of one each at least")
    if len(prompts) != len(continuations):
        raise InputError(
            f"there are {len(continuations)} continuations for {len(prompts)} prompts: give one "
            "each"
        )
    if not len(prompts):
        raise InputError("no prompts were given: there is nothing to read")
    pairs = []
    for number, (prompt, following) in enumerate(zip(prompts, continuations, strict=True)):
        pair = _continuation(token_ids, prompt, following, number, begin=begin)
        if len(pair.read) > context:
            raise InputError(
                f"prompt and continuation {number} have {len(pair.read) + 1} tokens, but this "
                f"model reads {context} at most: shorten the prompt"
            )
        pairs.append(pair)
    return pairs


def _continuation(
    token_ids: PromptEncoder, prompt: TextLike, following: TextLike, number: int, *, begin: bool
) -> Continuation:
    name = f"continuation {number}"
    before = token_ids.after("", prompt, begin=begin, name=f"prompt {number}").tokens
    if isinstance(prompt, str) and isinstance(following, str):
        both = token_ids.of_both(prompt, following, begin=begin, name=name)
        before, tokens = both.tokens[~both.mask], both.tokens[both.mask]
    elif isinstance(prompt, str) or isinstance(following, str):
        raise InputError(f"prompt and {name} must both be strings, or both token ids")
    else:
        tokens = token_ids.after("", following, begin=False, name=name).tokens
    if not len(tokens):
        raise InputError(f"{name} has no token of its own behind its prompt: leave it out")
    if not len(before):
        raise InputError(
            f"prompt and {name} begin with one token, before which nothing is read: say "
            "add_special_tokens=True"
        )
    return Continuation(before, tokens)


@dataclasses.dataclass(frozen=True)
class _ScoredPlaces:
    """Where in the rows of a call which tokens are to be scored.

    Attributes:
      owners: number of the continuation that asks; -1 where none does.
      places: behind which the token stands.
      targets: the token.
    """

    owners: Int[np.ndarray, "B N"]
    places: Int[np.ndarray, "B N"]
    targets: Int[np.ndarray, "B N"]


class Scorer:
    """Scores continuations with a model on a mesh.

    Args:
      model: its parameters lie on the mesh.
      mesh: rows are split over it.
    """

    def __init__(self, model: Decoder, mesh: Mesh):
        self._graph, self._parameters = nnx.split(model)
        self._mesh = mesh
        self._program = jax.jit(self._score_rows)

    def score(
        self, continuations: Sequence[Continuation], places: int, done: Callable[[int], None]
    ) -> tuple[Float64[np.ndarray, " C"], Bool[np.ndarray, " C"]]:
        """Returns the log-likelihood of each continuation in nats, and whether it is greedy.

        It is greedy if each of its tokens is the likeliest in its place. What several of them have
        the model read is read once: the answers A, B, C and D to a question cost as much as one.

        Args:
          continuations: prompts and what may follow them.
          places: the most places of a call on one device.
          done: is told the number of continuations that each call has scored.
        """
        log_likelihoods = np.zeros(len(continuations))
        is_greedy = np.ones(len(continuations), bool)
        texts, readers = _read_once(continuations)
        for call in plan_calls([len(text) for text in texts], batch_shards(self._mesh), places):
            scored = _scored_places(call, texts, readers, continuations)
            packed = pack(texts, call.rows, call.num_rows, call.row_length, call.num_texts)
            rows = (packed.tokens, packed.positions, packed.segment_ids)
            rows = jax.device_put(
                (*rows, scored.places, scored.targets),
                NamedSharding(self._mesh, partition_spec("batch")),
            )
            with jax.set_mesh(self._mesh):
                found = jax.device_get(self._program(self._parameters, *rows))
            is_asked = scored.owners >= 0
            owners = scored.owners[is_asked]
            np.add.at(log_likelihoods, owners, found[0][is_asked])
            np.logical_and.at(is_greedy, owners, found[1][is_asked])
            done(len(np.unique(owners)))
        return log_likelihoods, is_greedy

    def _score_rows(
        self,
        parameters: Any,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        places: Int[Array, "B N"],
        targets: Int[Array, "B N"],
    ) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
        """Returns how likely each target is behind its place, and if it is the likeliest."""
        model = nnx.merge(self._graph, parameters)
        hidden = model(tokens, positions, segment_ids, is_causal=True)

        def of_some(some: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            places, targets = some
            behind = jnp.take_along_axis(hidden, places[..., None], axis=1)
            logits = model.logits(behind).astype(jnp.float32)
            own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            is_greedy = jnp.argmax(logits, axis=-1) == targets
            return own - jax.nn.logsumexp(logits, axis=-1), is_greedy

        def in_parts(array: jax.Array) -> jax.Array:
            """[B, N] -> [N / PLACES_AT_ONCE, B, PLACES_AT_ONCE]"""
            return jnp.moveaxis(array.reshape(len(array), -1, PLACES_AT_ONCE), 1, 0)

        found = jax.lax.map(of_some, (in_parts(places), in_parts(targets)))
        return jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1).reshape(places.shape), found)


def _read_once(continuations: Sequence[Continuation]) -> tuple[list[Text], list[list[int]]]:
    """Returns the different texts to read, and of each the numbers of its continuations."""
    readers: dict[bytes, list[int]] = {}
    for number, continuation in enumerate(continuations):
        readers.setdefault(continuation.read.tobytes(), []).append(number)
    texts = [np.frombuffer(content, np.int32) for content in readers]
    return [Text(text, np.ones(len(text), bool)) for text in texts], list(readers.values())


def _scored_places(
    call: PackedCall,
    texts: Sequence[Text],
    readers: Sequence[Sequence[int]],
    continuations: Sequence[Continuation],
) -> _ScoredPlaces:
    """Returns what a call's rows are asked; N is `PLACES_AT_ONCE` times a power of two."""
    rows: list[list[tuple[int, int, int]]] = []
    for row in call.rows:
        asked, end = [], 0
        for text in row:
            end += len(texts[text])
            for number in readers[text]:
                tokens = continuations[number].tokens.tolist()
                places = range(end - len(tokens), end)
                asked += [(number, *one) for one in zip(places, tokens, strict=True)]
        rows.append(asked)
    width = PLACES_AT_ONCE
    while width < max(map(len, rows)):
        width *= 2
    arrays = np.zeros((3, call.num_rows, width), np.int32)
    arrays[0] = -1
    for row, asked in enumerate(rows):
        arrays[:, row, : len(asked)] = np.transpose(asked)
    return _ScoredPlaces(*arrays)
