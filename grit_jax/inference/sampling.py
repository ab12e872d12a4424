"""From logits to the next token: greedy, or drawn from a filtered distribution.

The filters are those of `transformers`, in its order: repetition penalty, temperature, top-k,
top-p, min-p.

Legend of dimensions: B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

FILTERED = -jnp.inf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; what is None is left out.

    Attributes:
      temperature: divides the logits; None takes the likeliest token.
      top_k: so many of the likeliest tokens are kept.
      top_p: of the likeliest tokens those are kept that have this probability together.
      min_p: tokens are kept that are at least this times as likely as the likeliest.
      repetition_penalty: makes tokens that were seen less likely where it is above 1.
    """

    temperature: float | None = None
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def of(
        cls,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> Sampling:
        """Returns what these values ask for; a temperature of 0 takes the likeliest token.

        Raises:
          ValueError: a value is impossible, or a filter has nothing to choose from.
        """
        filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        allowed = {
            "temperature": (temperature, temperature >= 0, "0 or above"),
            "top_k": (top_k, top_k is None or top_k >= 1, "at least 1"),
            "top_p": (top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
            "min_p": (min_p, min_p is None or 0 <= min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (
                repetition_penalty,
                repetition_penalty is None or repetition_penalty > 0,
                "above 0",
            ),
        }
        for name, (value, is_allowed, range_of_values) in allowed.items():
            if not is_allowed:
                raise ValueError(f"{name}={value} must be {range_of_values}")
        if temperature == 0:
            for name, value in filters.items():
                if value is not None:
                    raise ValueError(
                        f"{name}={value} has no effect without a temperature above 0: leave it out"
                    )
        return cls(
            temperature=temperature or None, repetition_penalty=repetition_penalty, **filters
        )


def filter_logits(
    logits: Float[Array, "B V"], sampling: Sampling, seen: Bool[Array, "B V"] | None
) -> Float[Array, "B V"]:
    """Returns the logits after all filters; `FILTERED` where a token is left out.

    Args:
      logits: scores of the next token.
      sampling: the filters.
      seen: the tokens that a row has had; for `repetition_penalty` alone.
    """
    if sampling.repetition_penalty is not None:
        assert seen is not None
        penalty = sampling.repetition_penalty
        penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(seen, penalized, logits)
    if sampling.temperature is not None:
        logits = logits / sampling.temperature
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[1]))[0][:, -1:]
        logits = jnp.where(logits < least, FILTERED, logits)
    if sampling.top_p is not None:
        logits = _filter_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        probabilities = jax.nn.softmax(logits)
        least = sampling.min_p * jnp.max(probabilities, axis=1, keepdims=True)
        logits = jnp.where(probabilities < least, FILTERED, logits)
    return logits


def _filter_top_p(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    ascending = jnp.sort(logits, axis=1)
    below = jnp.cumsum(jax.nn.softmax(ascending), axis=1) <= 1 - top_p
    below = below.at[:, -1].set(False)
    least = jnp.min(jnp.where(below, jnp.inf, ascending), axis=1, keepdims=True)
    return jnp.where(logits < least, FILTERED, logits)


def choose_tokens(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    seen: Bool[Array, "B V"] | None,
    keys: Key[Array, " B"],
) -> Int[Array, " B"]:
    """Returns a next token for each row, the likeliest or one drawn with the row's own key."""
    logits = filter_logits(logits.astype(jnp.float32), sampling, seen)
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
