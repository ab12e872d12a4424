"""Chooses the next token from the logits: greedily, or by sampling from a filtered distribution.

The filters and their order are those of `transformers`: repetition penalty, temperature, top-k,
top-p, min-p.

Legend of dimensions: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np

from grit_jax.pytree import pytree_dataclass

FILTERED = -jnp.inf
# Options are float32 in the compiled programs.
LARGEST = float(jnp.finfo(jnp.float32).max)
# Filters that have no effect on greedy decoding.
SAMPLING_FILTERS = ("top_k", "top_p", "min_p")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How `GritLM.generate` chooses tokens. The default is greedy decoding.

    A pytree: under `jax.jit`, a program is compiled again only if `top_k` changes, or if a filter
    is switched on or off.

    Attributes:
      temperature: divides the logits before sampling; 0 or None is greedy decoding.
      top_k: sample from this many of the most likely tokens.
      top_p: sample from the smallest set of most likely tokens whose probabilities sum to this.
      min_p: sample from tokens that are at least this fraction as likely as the most likely one.
      repetition_penalty: above 1 makes tokens of the prompt and of the text so far less likely.

    Raises:
      ValueError: a value is out of range, or a filter is given without a temperature.
    """

    temperature: float | int | None = None
    top_k: int | None = None
    top_p: float | int | None = None
    min_p: float | int | None = None
    repetition_penalty: float | int | None = None

    def __post_init__(self):
        for name, (number_type, is_valid, valid_range) in RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            is_number = isinstance(value, number_type) and not isinstance(value, bool)
            if not is_number or not is_valid(value):
                raise ValueError(f"{name}={value!r} must be {valid_range}")
            # 1 and 1.0 share a program.
            object.__setattr__(self, name, int(value) if name == "top_k" else float(value))
        # The structure of the pytree decides between greedy decoding and sampling.
        if self.temperature == 0:
            object.__setattr__(self, "temperature", None)
        for name in SAMPLING_FILTERS:
            if self.temperature is None and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={value} has no effect without a temperature above 0: leave it out, or "
                    "set temperature"
                )


# The type of each option, the check of its value, and the values that pass it.
RANGES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "temperature": (
        numbers.Real,
        lambda value: 0 <= value <= LARGEST,
        "a finite number, 0 or above",
    ),
    "top_k": (numbers.Integral, lambda value: value >= 1, "an integer, at least 1"),
    "top_p": (numbers.Real, lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    "min_p": (numbers.Real, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "repetition_penalty": (
        numbers.Real,
        lambda value: 0 < value <= LARGEST,
        "a finite number above 0",
    ),
}


def _flatten(sampling: Sampling) -> tuple[tuple[Any, ...], int | None]:
    return tuple(getattr(sampling, name) for name in _TRACED), sampling.top_k


def _unflatten(top_k: int | None, traced: tuple[Any, ...]) -> Sampling:
    sampling = object.__new__(Sampling)  # The leaves may be tracers, which cannot be checked.
    for name, value in zip((*_TRACED, "top_k"), (*traced, top_k), strict=True):
        object.__setattr__(sampling, name, value)
    return sampling


_TRACED = ("temperature", "top_p", "min_p", "repetition_penalty")
jax.tree_util.register_pytree_node(Sampling, _flatten, _unflatten)


def as_sampling(
    sampling: Sampling | None, *, do_sample: bool | None = None, **options: Any
) -> Sampling:
    """Returns the sampling options that were passed as one object or as keywords.

    Args:
      sampling: all options in one object.
      do_sample: see `GritLM.generate`.
      **options: the fields of `Sampling`; None is not set.

    Raises:
      ValueError: both were given, or see `Sampling`.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if sampling is not None:
        names = [*given, *([] if do_sample is None else ["do_sample"])]
        if names:
            raise ValueError(
                f"sampling= and {'=, '.join(names)}= were both given: put all options into sampling"
            )
        return sampling
    if do_sample:
        given.setdefault("temperature", 1.0)
    elif do_sample is False and given.get("temperature"):
        raise ValueError(
            f"temperature={given['temperature']} has no effect with do_sample=False: leave one out"
        )
    return Sampling(**given)


def filter_logits(
    logits: Float[Array, "B V"], sampling: Sampling, seen: Bool[Array, "B V"] | None
) -> Float[Array, "B V"]:
    """Returns the logits after all filters, `FILTERED` for tokens that must not be sampled.

    With a temperature, the logits of a row are shifted, which does not change the probabilities.

    Args:
      logits: logits of the next token.
      sampling: the filters.
      seen: tokens that occurred in each row; needed only by `repetition_penalty`.
    """
    if sampling.repetition_penalty is not None:
        assert seen is not None
        logits = _penalize(logits, seen, sampling.repetition_penalty)
    if sampling.temperature is not None:
        logits = _divide_by_temperature(logits, sampling.temperature)
    if sampling.top_k is not None:
        threshold = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[1]))[0][:, -1:]
        logits = jnp.where(logits < threshold, FILTERED, logits)
    if sampling.top_p is not None:
        logits = _filter_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = _filter_min_p(logits, sampling.min_p)
    return logits


# An option of all rows, or of each row.
_Option = float | Float[Array, ""] | Float[Array, "B 1"]


def _penalize(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: _Option
) -> Float[Array, "B V"]:
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalized, logits)


def _divide_by_temperature(
    logits: Float[Array, "B V"], temperature: _Option
) -> Float[Array, "B V"]:
    # The largest logit becomes 0, so that low temperatures cannot make it infinite.
    temperature = jnp.maximum(temperature, jnp.finfo(logits.dtype).tiny)
    return (logits - jnp.max(logits, axis=1, keepdims=True)) / temperature


def _filter_min_p(logits: Float[Array, "B V"], min_p: _Option) -> Float[Array, "B V"]:
    probabilities = jax.nn.softmax(logits)
    threshold = min_p * jnp.max(probabilities, axis=1, keepdims=True)
    return jnp.where(probabilities < threshold, FILTERED, logits)


def _filter_top_k_by_row(
    logits: Float[Array, "B V"], top_k: Int[Array, "B 1"]
) -> Float[Array, "B V"]:
    ascending = jnp.sort(logits, axis=1)
    index = jnp.maximum(logits.shape[1] - top_k, 0)
    threshold = jnp.take_along_axis(ascending, index, axis=1)
    return jnp.where(logits < threshold, FILTERED, logits)


def _filter_top_p(logits: Float[Array, "B V"], top_p: _Option) -> Float[Array, "B V"]:
    ascending = jnp.sort(logits, axis=1)
    is_removed = jnp.cumsum(jax.nn.softmax(ascending), axis=1) <= 1 - top_p
    is_removed = is_removed.at[:, -1].set(False)  # The most likely token is always kept.
    threshold = jnp.min(jnp.where(is_removed, jnp.inf, ascending), axis=1, keepdims=True)
    return jnp.where(logits < threshold, FILTERED, logits)


def choose_tokens(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    seen: Bool[Array, "B V"] | None,
    keys: Key[Array, " B"],
) -> Int[Array, " B"]:
    """Returns the next token of each row: the most likely one, or one sampled with the row's key.

    Args:
      logits: logits of the next token.
      sampling: greedy decoding, or the filters.
      seen: see `filter_logits`.
      keys: one key for each row.
    """
    logits = filter_logits(logits.astype(jnp.float32), sampling, seen)
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


@pytree_dataclass
class RowSampling:
    """A `Sampling` for each row of a batch, so that one program serves them all.

    Attributes:
      temperature: 0 for greedy decoding.
      top_k: 0 for no filter.
      top_p: 0 for no filter.
      min_p: 0 for no filter.
      repetition_penalty: 1 for no penalty.
    """

    temperature: Float[Array | np.ndarray, " B"]
    top_k: Int[Array | np.ndarray, " B"]
    top_p: Float[Array | np.ndarray, " B"]
    min_p: Float[Array | np.ndarray, " B"]
    repetition_penalty: Float[Array | np.ndarray, " B"]

    @classmethod
    def stack(cls, rows: Sequence[Sampling]) -> RowSampling:
        """Returns the options of all rows."""
        tiny = np.finfo(np.float32).tiny

        def column(name: str, unset: float = 0.0) -> np.ndarray:
            values = (getattr(row, name) for row in rows)
            # Smaller values are not 0, which stands for none.
            return np.array([max(value, tiny) if value else unset for value in values], np.float32)

        top_k = [min(row.top_k or 0, np.iinfo(np.int32).max) for row in rows]
        return cls(
            temperature=column("temperature"),
            top_k=np.array(top_k, np.int32),
            top_p=column("top_p"),
            min_p=column("min_p"),
            repetition_penalty=column("repetition_penalty", unset=1.0),
        )


def choose_tokens_by_row(
    logits: Float[Array, "B V"],
    sampling: RowSampling,
    seen: Bool[Array, "B V"],
    keys: Key[Array, " B"],
) -> Int[Array, " B"]:
    """Returns the next token of each row, as `choose_tokens` does for rows with equal options.

    A filter that no row has costs nothing.

    Args:
      logits: logits of the next token.
      sampling: the options of each row.
      seen: see `filter_logits`; only rows with a repetition penalty need it.
      keys: one key for each row.
    """

    def apply(
        function: Callable[..., jax.Array], otherwise: jax.Array, option: jax.Array, unset: float
    ) -> jax.Array:
        """Returns `function(option)` in the rows that have the option, else `otherwise`."""
        is_set = option != unset

        def apply_to_some() -> jax.Array:
            is_changed = is_set.reshape(-1, *[1] * (otherwise.ndim - 1))
            return jnp.where(is_changed, function(option[:, None]), otherwise)

        return jax.lax.cond(jnp.any(is_set), apply_to_some, lambda: otherwise)

    def sample(temperature: Float[Array, "B 1"]) -> Int[Array, " B"]:
        filtered = _divide_by_temperature(penalized, temperature)
        for filter_by_row, option in (
            (_filter_top_k_by_row, sampling.top_k),
            (_filter_top_p, sampling.top_p),
            (_filter_min_p, sampling.min_p),
        ):
            function = functools.partial(filter_by_row, filtered)
            filtered = apply(function, filtered, jnp.asarray(option), 0.0)
        return jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)

    logits = logits.astype(jnp.float32)
    penalize = functools.partial(_penalize, logits, seen)
    penalized = apply(penalize, logits, jnp.asarray(sampling.repetition_penalty), 1.0)
    most_likely = jnp.argmax(penalized, axis=1).astype(jnp.int32)
    return apply(sample, most_likely, jnp.asarray(sampling.temperature), 0.0)
