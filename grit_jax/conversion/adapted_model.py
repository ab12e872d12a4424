"""Models with low-rank updates (LoRA), which are added to the base's weights as they are read."""

import abc
from collections.abc import Mapping
import dataclasses
from typing import Any, Protocol, runtime_checkable

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
from jaxtyping import Shaped
import numpy as np

from grit_jax.conversion.layout import Index, ParamSpec
from grit_jax.conversion.stored_model import StoredModel


@dataclasses.dataclass(frozen=True)
class LowRankUpdate:
    """The update scale A B of a parameter.

    Attributes:
      a: A, whose axes are those of the stack, the parameter's inputs, and the rank.
      b: B, whose axes are those of the stack, the rank, and the parameter's outputs.
      scale: alpha / rank.
    """

    a: Shaped[np.ndarray, "..."]
    b: Shaped[np.ndarray, "..."]
    scale: float

    def read(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a slice of scale A B, in float32, with one axis for inputs and one for outputs.

        Args:
          parameter: the parameter that is updated.
          index: a slice for each axis of the parameter.
        """
        num_stacked = len(parameter.stack_shape)
        middle = num_stacked + parameter.num_inputs
        stack, inputs, outputs = index[:num_stacked], index[num_stacked:middle], index[middle:]
        a, b = self.a[(*stack, *inputs)], self.b[(*stack, slice(None), *outputs)]
        a = a.reshape(*a.shape[:num_stacked], -1, a.shape[-1])
        b = b.reshape(*b.shape[: num_stacked + 1], -1)
        return self.scale * (a @ b)


@runtime_checkable
class ParameterSource(Protocol):
    """Whatever stores parameters, such as a `StoredModel`."""

    def dtype(self, parameter: ParamSpec) -> np.dtype:
        """Returns the type of the arrays that `read` returns for a parameter."""
        ...

    def read(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a slice of a parameter."""
        ...


class AdaptedModel(StoredModel):
    """The merged weights W + scale A B of a base model and an adapter.

    Only the slice that is read is merged, so that the merged model never has to fit in memory.

    Attributes:
      base: the base model.
      adapted: the paths of the parameters with an update.
      stored_whole: the parameters that replace those of the base, by path, and what stores them.
    """

    base: StoredModel
    adapted: frozenset[tuple[str, ...]]
    stored_whole: Mapping[tuple[str, ...], ParameterSource]

    @abc.abstractmethod
    def update(self, parameter: ParamSpec) -> LowRankUpdate:
        """Returns the whole update of one of the parameters in `adapted`."""

    @abc.abstractmethod
    def ranks(self, parameter: ParamSpec) -> set[int]:
        """Returns the ranks of a parameter's update in its layers, 0 for a layer without one."""

    def dtype(self, parameter: ParamSpec) -> np.dtype:
        """Returns the type that W is stored in; `read` returns adapted weights in float32."""
        return self._owner(parameter).dtype(parameter)

    def read(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a slice of a parameter, in float32 if it is adapted."""
        weight = self._owner(parameter).read(parameter, index)
        if parameter.path not in self.adapted:
            return weight
        return weight + self.update(parameter).read(parameter, index).reshape(weight.shape)

    def load_unmerged(self, shapes: dict[str, Any]) -> dict[str, Any]:
        """Returns the base's parameters and the adapter's A and B, see `StoredModel.load`.

        Args:
          shapes: see `StoredModel.load`; with shapes for A and B, which a module with LoRA has.
        """
        by_path: dict[tuple[str, ...], Any] = flatten_dict(shapes)  # pyright: ignore[reportAssignmentType]
        loaded = {}
        for parameter in self.parameters:
            if parameter.path not in self.adapted:
                continue
            update, (*module, name) = self.update(parameter), parameter.path
            for letter, matrix in (("a", update.a), ("b", update.b)):
                path = (*module, f"{name}_lora", letter)
                shape = by_path[path]
                loaded[path] = jax.make_array_from_callback(
                    shape.shape, shape.sharding, matrix.astype(shape.dtype).__getitem__
                )
        self.check_finite(unflatten_dict(loaded))
        return unflatten_dict(flatten_dict(self.base.load(shapes)) | loaded)

    def _owner(self, parameter: ParamSpec) -> ParameterSource:
        """Returns what stores the parameter's W."""
        return self.stored_whole.get(parameter.path, self.base)
