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
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are scaled for texts longer than those of pretraining.

    Names, defaults and results are those of transformers.

    Attributes:
      rope_type: "linear" divides all frequencies by `factor` (arXiv 2306.15595); "llama3" divides
        the low ones (arXiv 2407.21783); "yarn" the low ones, and lengthens queries and keys (arXiv
        2309.00071).
      factor: how many times longer texts may be.
      original_max_position_embeddings: longest text of pretraining, in tokens.
      low_freq_factor: "llama3" divides by `factor` where fewer rotations than this fit the original
        length.
      high_freq_factor: "llama3" keeps frequencies of which more rotations than this fit.
      attention_factor: "yarn" multiplies queries and keys by this; by default it follows from
        `factor`, `mscale` and `mscale_all_dim`.
      beta_fast: "yarn" keeps frequencies of which more rotations than this fit.
      beta_slow: "yarn" divides by `factor` where fewer rotations than this fit.
      mscale: see `attention_factor`.
      mscale_all_dim: see `attention_factor`.
      truncate: whether "yarn" rounds the bounds of its ramp to whole frequencies.
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
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
            if name not in ("rope_type", "truncate") and not is_number:
                raise ValueError(f"rotary embeddings: {name}={value!r} must be a positive number")
        whole = ("rope_type", "truncate", "original_max_position_embeddings")
        # JSON may have 8 for 8.0.
        values: dict[str, Any] = {n: v if n in whole else float(v) for n, v in given.items()}
        return cls(**values)

    def to_fields(self) -> dict[str, Any]:
        """Returns the fields that have a value, under their names in config.json."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def amplitude(self) -> float:
        """What queries and keys are multiplied by, in addition to their rotation."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._yarn_amplitude(self.mscale) / self._yarn_amplitude(self.mscale_all_dim)
        return self._yarn_amplitude(1.0)

    def scale(
        self, frequencies: Float[np.ndarray, " half"], theta: float
    ) -> Float[np.ndarray, " half"]:
        """Returns the scaled rotary frequencies.

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


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Float[np.ndarray, " half"]:
    """Returns the rotation of each pair of a head per position, in radians, as float32.

    Args:
      head_dim: size of a head.
      theta: base of the frequencies.
      scaling: their scaling, or None.
    """
    half = head_dim // 2
    frequencies = theta ** -(np.arange(half) / half)
    if scaling is not None:
        frequencies = scaling.scale(frequencies, theta)
    return frequencies.astype(np.float32)


def rotary_embedding(
    heads: Float[Array, "B S heads H"],
    positions: Int[Array | np.ndarray, "B S"],
    frequencies: Float[Array | np.ndarray, " half"],
    amplitude: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B S heads H"]:
    """Rotates the pairs (i, i + H/2) of each head by position x frequency.

    Args:
      heads: queries or keys.
      positions: position of each token in its text.
      frequencies: see `rotary_frequencies`.
      amplitude: what the result is multiplied by.
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    if not isinstance(amplitude, float) or amplitude != 1.0:
        cosine, sine = amplitude * cosine, amplitude * sine
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(rotated, axis=-1).astype(heads.dtype)
