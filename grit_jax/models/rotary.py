"""Rotary position embeddings (arXiv 2104.09864), and their extensions to longer texts.

For dimensions see `grit_jax.models`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

# The fields of each type of scaling under their names in config.json: required, then optional ones.
SCALING_FIELDS = {
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        (
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "llama_4_scaling_beta",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "dynamic": (("factor", "original_max_position_embeddings"), ()),
    "longrope": (
        ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
        ("attention_factor",),
    ),
}
# The fields with a factor for each frequency.
FACTOR_LISTS = {"short_factor", "long_factor"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are scaled for texts longer than those of pretraining.

    Names, defaults and results are those of transformers.

    Attributes:
      rope_type: "linear" divides all frequencies by `factor` (arXiv 2306.15595); "llama3" divides
        the low ones (arXiv 2407.21783); "yarn" the low ones, and lengthens queries and keys (arXiv
        2309.00071). "dynamic" raises the base with the length of a text;
        "longrope" divides each by its own factor (arXiv 2402.13753). For these two, the length of a
        text is that of its tokens in the call and those before them, so keys that are in a cache
        keep the frequencies of the length that the text had.
      factor: how many times longer texts may be.
      original_max_position_embeddings: longest text of pretraining, in tokens.
      low_freq_factor: "llama3" divides by `factor` where fewer rotations than this fit the original
        length.
      high_freq_factor: "llama3" keeps frequencies of which more rotations than this fit.
      attention_factor: "yarn" and "longrope" multiply queries and keys by this; by default it
        follows from `factor`, and for "yarn" from `mscale` and `mscale_all_dim`.
      beta_fast: "yarn" keeps frequencies of which more rotations than this fit.
      beta_slow: "yarn" divides by `factor` where fewer rotations than this fit.
      mscale: see `attention_factor`.
      mscale_all_dim: see `attention_factor`.
      truncate: whether "yarn" rounds the bounds of its ramp to whole frequencies.
      llama_4_scaling_beta: how much longer queries are made for every multiple of the original
        length that their position is beyond; None for not at all.
      short_factor: "longrope" divides by these in texts up to the original length.
      long_factor: "longrope" divides by these in longer texts.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    llama_4_scaling_beta: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> RopeScaling:
        """Returns the scaling that these fields of `rope_parameters` in a config.json describe.

        Raises:
          ValueError: the type is unknown, or a field is missing, unknown or not positive.
        """
        rope_type = fields.get("rope_type")
        if rope_type not in SCALING_FIELDS:
            raise ValueError(
                f"rotary embeddings of type {rope_type!r} are not supported, only 'default', "
                f"{', '.join(map(repr, SCALING_FIELDS))}"
            )
        required, optional = SCALING_FIELDS[rope_type]
        given = {name: value for name, value in fields.items() if value is not None}
        for name in required:
            if name not in given:
                raise ValueError(f"rotary embeddings of type {rope_type!r} need {name}")
        for name, value in given.items():
            if name not in ("rope_type", *required, *optional):
                raise ValueError(f"rotary embeddings of type {rope_type!r} have no {name}")
            if name not in ("rope_type", "truncate") and not _is_positive(name, value):
                raise ValueError(f"rotary embeddings: {name}={value!r} must be positive")
        # JSON may have 8 for 8.0.
        values: dict[str, Any] = dict(given)
        for name, value in given.items():
            if name in FACTOR_LISTS:
                values[name] = tuple(map(float, value))
            elif name not in ("rope_type", "truncate", "original_max_position_embeddings"):
                values[name] = float(value)
        return cls(**values)

    def to_fields(self) -> dict[str, Any]:
        """Returns the fields that have a value, under their names in config.json."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def amplitude(self) -> float:
        """What queries and keys are multiplied by, in addition to their rotation."""
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.rope_type == "longrope":
            assert self.original_max_position_embeddings is not None
            exponent = math.log(max(self.factor, 1.0)) / math.log(
                self.original_max_position_embeddings
            )
            return math.sqrt(1 + exponent)
        if self.mscale and self.mscale_all_dim:
            return self._yarn_amplitude(self.mscale) / self._yarn_amplitude(self.mscale_all_dim)
        return self._yarn_amplitude(1.0)

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies depend on the length of a text."""
        return self.rope_type in ("dynamic", "longrope")

    def scale_by_length(
        self, frequencies: Float[np.ndarray, " half"], lengths: Int[Array, "B S"]
    ) -> Float[Array, "B S 1 half"]:
        """Returns the scaled rotary frequencies of each token.

        Args:
          frequencies: those of pretraining, in radians per position.
          lengths: number of tokens in the text of each token.
        """
        original, lengths = self.original_max_position_embeddings, lengths[:, :, None, None]
        assert original is not None
        if self.rope_type == "longrope":
            assert self.short_factor is not None
            assert self.long_factor is not None
            short, long = (
                frequencies / np.asarray(factors)
                for factors in (self.short_factor, self.long_factor)
            )
            return jnp.where(lengths > original, long, short)
        growth = self.factor * jnp.maximum(lengths, original) / original - (self.factor - 1)
        half = len(frequencies)
        return growth ** (-np.arange(half) / (half - 1)) * frequencies

    def query_scale(self, positions: Int[Array | np.ndarray, "B S"]) -> Float[Array, "B S 1 1"]:
        """Returns what the queries of each token are multiplied by (`llama_4_scaling_beta`)."""
        assert self.original_max_position_embeddings is not None
        assert self.llama_4_scaling_beta is not None
        # Padding before a text has negative positions.
        multiples = jnp.maximum(positions, 0) // self.original_max_position_embeddings
        return 1 + self.llama_4_scaling_beta * jnp.log1p(multiples)[:, :, None, None]

    def scale(
        self, frequencies: Float[np.ndarray, " half"], theta: float
    ) -> Float[np.ndarray, " half"]:
        """Returns the scaled rotary frequencies, which are the same for all texts.

        Args:
          frequencies: those of pretraining, in radians per position.
          theta: their base.
        """
        if self.rope_type == "linear":
            return frequencies / self.factor
        if self.rope_type == "llama3":
            return self._mix(frequencies, self._llama3_kept(frequencies))
        return self._mix(frequencies, self._yarn_kept(len(frequencies), theta))

    def _mix(
        self, frequencies: Float[np.ndarray, " half"], kept: Float[np.ndarray, " half"]
    ) -> Float[np.ndarray, " half"]:
        """Returns each frequency, of which a fraction is kept and the rest divided by `factor`."""
        return kept * frequencies + (1 - kept) * frequencies / self.factor

    def _llama3_kept(self, frequencies: Float[np.ndarray, " half"]) -> Float[np.ndarray, " half"]:
        assert self.original_max_position_embeddings is not None
        assert self.low_freq_factor is not None
        assert self.high_freq_factor is not None
        rotations = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        width = self.high_freq_factor - self.low_freq_factor
        return np.clip((rotations - self.low_freq_factor) / width, 0, 1)

    def _yarn_kept(self, half: int, theta: float) -> Float[np.ndarray, " half"]:
        length = self.original_max_position_embeddings
        assert length is not None

        def index_of(rotations: float) -> float:
            """Returns the index of the frequency of which `rotations` fit the original length."""
            return half * math.log(length / (rotations * 2 * math.pi)) / math.log(theta)

        first, last = index_of(self.beta_fast or 32.0), index_of(self.beta_slow or 1.0)
        if self.truncate is not False:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        width = last - first if last != first else 0.001
        return 1 - np.clip((np.arange(half) - first) / width, 0, 1)

    def _yarn_amplitude(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


def _is_positive(name: str, value: Any) -> bool:
    """Returns whether a field's value is a positive number, or some for a list of factors."""
    if name in FACTOR_LISTS:
        return isinstance(value, list | tuple) and all(_is_positive("", one) for one in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Float[np.ndarray, " half"]:
    """Returns the rotation of each pair of a head per position, in radians, as float32.

    Args:
      head_dim: size of a head.
      theta: base of the frequencies.
      scaling: their scaling, or None. One that depends on the length of a text is not applied.
    """
    half = head_dim // 2
    frequencies = theta ** -(np.arange(half) / half)
    if scaling is not None and not scaling.depends_on_length:
        frequencies = scaling.scale(frequencies, theta)
    return frequencies.astype(np.float32)


def text_lengths(
    positions: Int[Array | np.ndarray, "B S"], segment_ids: Int[Array | np.ndarray, "B S"]
) -> Int[Array, "B S"]:
    """Returns the length of each token's text, up to the last of its tokens in these rows."""
    is_same_text = jnp.equal(segment_ids[:, :, None], segment_ids[:, None, :])
    return jnp.max(jnp.where(is_same_text, positions[:, None, :], 0), axis=2) + 1


def rotary_embedding(
    heads: Float[Array, "B S heads H"],
    positions: Int[Array | np.ndarray, "B S"],
    frequencies: Float[Array | np.ndarray, " half"] | Float[Array, "B S 1 half"],
    amplitude: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B S heads H"]:
    """Rotates the pairs (i, i + H/2) of each head by position x frequency.

    Args:
      heads: queries or keys.
      positions: position of each token in its text.
      frequencies: see `rotary_frequencies`, and `RopeScaling.scale_by_length`.
      amplitude: what the result is multiplied by.
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    if not isinstance(amplitude, float) or amplitude != 1.0:
        cosine, sine = amplitude * cosine, amplitude * sine
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(rotated, axis=-1).astype(heads.dtype)
