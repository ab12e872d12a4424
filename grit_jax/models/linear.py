"""Linear layers, each of which may have a low-rank update (LoRA, arXiv 2106.09685).

y = x W, and where the layer is adapted y = x W + (alpha / rank) (x A) B. The update is applied to
what goes through the layer and never added to W: W may be in bfloat16, which would round small
updates away, and has no gradient. B starts at 0, so that the first step sees W alone.

Legend of dimensions: M tokens, U rank of the update.
"""

from __future__ import annotations

from collections.abc import Collection
import dataclasses
import fnmatch
import math
from typing import TYPE_CHECKING

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8
import numpy as np

from grit_jax.sharding import with_logical_constraint

if TYPE_CHECKING:
    from grit_jax.models.decoder import ModelConfig

# What the products of a layer are made with: (W,), or (W, (alpha / rank) A, B) of an adapted one.
Weight = tuple[Array, ...]

# It is small, and decides which experts are read at all.
KEPT_FROM_INT8 = ("feed_forward.router",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linear layers have a low-rank update, and how it is made.

    Attributes:
      rank: of the updates.
      alpha: the updates are multiplied by alpha / rank.
      targets: patterns with the wildcards of a shell, separated by commas, of the names of layers,
        such as "attention.*,feed_forward.gate".

    Raises:
      ValueError: a number is impossible; the message names it.
    """

    rank: int
    alpha: float
    targets: str

    def __post_init__(self):
        for name in ("rank", "alpha"):
            if getattr(self, name) <= 0:
                raise ValueError(f"config.lora.{name}={getattr(self, name)} must be positive")

    def targeted(self, layers: Collection[str]) -> list[str]:
        """Returns those of the layers that are adapted.

        Raises:
          ValueError: a pattern matches none of them; the message names it, and them.
        """
        found: set[str] = set()
        for pattern in self.targets.split(","):
            matching = {n for n in layers if fnmatch.fnmatchcase(n, pattern.strip())}
            if not matching:
                raise ValueError(
                    f"config.lora.targets={self.targets!r}: {pattern!r} matches no linear layer; "
                    f"there are {', '.join(layers)}"
                )
            found |= matching
        return [layer for layer in layers if layer in found]


def linear(inputs: Float[Array, "M ..."], weight: Weight) -> Float[Array, "M ..."]:
    """Returns x W, or x W + (alpha / rank) (x A) B where the layer is adapted.

    All axes of x but the first are summed over with the first axes of W.

    Args:
      inputs: x.
      weight: what `LinearLayers.weight` returns.
    """
    matrix, *update = weight
    # Not an einsum: it sums over heads and head dimension in the order of the alphabet, for which
    # XLA transposes W in every call.
    outputs = jnp.tensordot(inputs, matrix, inputs.ndim - 1)
    if not update:
        return outputs
    a, b = update
    narrow = with_logical_constraint(jnp.tensordot(inputs, a, a.ndim - 1), "batch", None)  # [M, U]
    return outputs + jnp.tensordot(narrow, b, 1)


def round_to_int8(
    matrix: Float[np.ndarray, "*inputs_and_outputs"], num_inputs: int
) -> tuple[Int8[np.ndarray, "*inputs_and_outputs"], Float32[np.ndarray, "*ones_and_outputs"]]:
    """Returns W in int8, and for each output what it is to be multiplied with.

    Args:
      matrix: W.
      num_inputs: how many of its axes, the first, are inputs.
    """
    wide = np.asarray(matrix, np.float32)
    largest = np.abs(wide).max(axis=tuple(range(num_inputs)), keepdims=True)
    scale = np.maximum(largest, np.finfo(np.float32).tiny) / 127
    return np.rint(wide / scale).astype(np.int8), scale


class LoRA(nnx.Module):
    """The matrices A and B of one linear layer, or of each expert; in float32.

    Args:
      weight: the layer's W, whose axes theirs are: inputs and rank, rank and outputs.
      num_inputs: how many of its axes are inputs, those of experts not counted.
      rank: size of the axis that A and B share.
      rngs: with the stream "lora".
    """

    def __init__(self, weight: nnx.Param, num_inputs: int, rank: int, *, rngs: nnx.Rngs):
        axes, shape = weight.get_metadata()["out_sharding"], weight.shape
        stack = 1 if axes[0] == "experts" else 0
        middle = stack + num_inputs
        a = jax.random.normal(rngs.lora(), (*shape[:middle], rank))
        a *= math.prod(shape[stack:middle]) ** -0.5  # x A is about as large as x.
        b = jnp.zeros((*shape[:stack], rank, *shape[middle:]))
        a_axes, b_axes = (*axes[:middle], "lora"), (*axes[:stack], "lora", *axes[middle:])
        self.a = nnx.LoRAParam(a, out_sharding=a_axes, eager_sharding=False)
        self.b = nnx.LoRAParam(b, out_sharding=b_axes, eager_sharding=False)


class LinearLayers(nnx.Module):
    """A module of linear layers: the W of each is the attribute of its name.

    The update of a layer that is adapted is the attribute NAME_lora, the scales of one in int8 are
    the attribute NAME_scale.
    """

    config: ModelConfig

    def adapt(self, scope: str, *, rngs: nnx.Rngs) -> None:
        """Adds what `config.lora` and `config.linear_dtype` ask for, when all W are there.

        Args:
          scope: this module's part of the layers' names, what is before the dot.
          rngs: with the stream "lora".
        """
        if self.config.linear_dtype == "int8":
            self._make_room_for_int8(scope)
        if self.config.lora is None:
            return
        for layer in self.config.lora.targeted(self.config.linear_layers):
            module, name = layer.split(".")
            if module == scope:
                num_inputs, rank = self.config.linear_layers[layer], self.config.lora.rank
                update = LoRA(getattr(self, name), num_inputs, rank, rngs=rngs)
                setattr(self, f"{name}_lora", update)

    def _make_room_for_int8(self, scope: str) -> None:
        """Puts int8 in the place of W, and scales beside it, both to be loaded."""
        for layer, num_inputs in self.config.linear_layers.items():
            module, name = layer.split(".")
            if module != scope or layer in KEPT_FROM_INT8:
                continue
            weight = getattr(self, name)
            axes = weight.get_metadata()["out_sharding"]
            stack = 1 if axes[0] == "experts" else 0
            ones = (1,) * num_inputs
            shape = (*weight.shape[:stack], *ones, *weight.shape[stack + num_inputs :])
            scale_axes = (*axes[:stack], *(None for _ in ones), *axes[stack + num_inputs :])
            rounded, scale = jnp.zeros(weight.shape, jnp.int8), jnp.ones(shape)
            setattr(self, name, nnx.Param(rounded, out_sharding=axes, eager_sharding=False))
            scales = nnx.Param(scale, out_sharding=scale_axes, eager_sharding=False)
            setattr(self, f"{name}_scale", scales)

    def weight(self, name: str, dtype: str | None = None) -> Weight:
        """Returns what a layer's products are made with, by default in the type `config.dtype`."""
        dtype = dtype or self.config.dtype
        matrix = getattr(self, name)[...].astype(dtype)
        scale = getattr(self, f"{name}_scale", None)
        if scale is not None:
            matrix *= scale[...].astype(dtype)
        update = getattr(self, f"{name}_lora", None)
        if update is None or self.config.lora is None:
            return (matrix,)
        scale = self.config.lora.alpha / self.config.lora.rank
        return matrix, (scale * update.a[...]).astype(dtype), update.b[...].astype(dtype)
