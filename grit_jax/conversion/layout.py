"""The layout of each parameter in a Hugging Face checkpoint.

Hugging Face stores a linear layer's weight as [out, in], one matrix for each layer and expert. Our
parameters are stacked over layers and experts, have the inputs first, and have an axis for the
heads and one for the size of a head. For dimensions see `grit_jax.models`.
"""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
import math

from jaxtyping import Shaped
import numpy as np

from grit_jax.models import ModelConfig, weights_of
from grit_jax.models.weights import LAYERS

# Side of the blocks in which a matrix is transposed.
BLOCK = 128

Index = tuple[slice, ...]
# Reads a part of a tensor: read(name, index).
Read = Callable[[str, Index], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter and the Hugging Face tensors that it is made of.

    Attributes:
      path: its path in the model, such as ("layers", "attention", "query").
      name: name of the tensors, with {layer} and {expert} if there are several.
      stack_shape: sizes of the first axes, which stack layers and experts.
      shape: sizes of the other axes.
      num_inputs: number of input axes in `shape`; 0 for a weight that is not of a linear layer.
      is_flat: whether each tensor has one axis for all of `shape`.
    """

    path: tuple[str, ...]
    name: str
    stack_shape: tuple[int, ...]
    shape: tuple[int, ...]
    num_inputs: int = 0
    is_flat: bool = False

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.stack_shape + self.shape

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each Hugging Face tensor."""
        if not self.num_inputs:
            return (math.prod(self.shape),) if self.is_flat else self.shape
        inputs, outputs = self.shape[: self.num_inputs], self.shape[self.num_inputs :]
        return math.prod(outputs), math.prod(inputs)

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yields the index of each tensor in the stack, and its name."""
        for index in itertools.product(*map(range, self.stack_shape)):
            yield index, self._tensor_name(index)

    def read(self, index: Index, read: Read) -> Shaped[np.ndarray, "..."]:
        """Returns the part `index` of the parameter, reading no other parts of the tensors."""
        bounds = [range(*i.indices(size)) for i, size in zip(index, self.full_shape, strict=True)]
        stack, own = bounds[: len(self.stack_shape)], bounds[len(self.stack_shape) :]
        parts = [
            self._read_tensor(self._tensor_name(stack_index), own, read)
            for stack_index in itertools.product(*stack)
        ]
        shape = [len(axis) for axis in stack] + list(parts[0].shape)
        return parts[0].reshape(shape) if len(parts) == 1 else np.stack(parts).reshape(shape)

    def to_tensor(self, part: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Returns the Hugging Face tensor of one layer's (and expert's) part of the parameter."""
        if not self.num_inputs:
            return np.ascontiguousarray(part).reshape(self.tensor_shape)
        rows, columns = self.tensor_shape
        return transpose(part.reshape(columns, rows))

    def _tensor_name(self, stack_index: tuple[int, ...]) -> str:
        return self.name.format(**dict(zip(("layer", "expert"), stack_index, strict=False)))

    def _read_tensor(self, name: str, own: list[range], read: Read) -> np.ndarray:
        if self.is_flat:
            return read(name, (_flat_slice(own, self.shape),)).reshape([len(axis) for axis in own])
        if not self.num_inputs:
            return read(name, tuple(slice(axis.start, axis.stop) for axis in own))
        inputs, outputs = own[: self.num_inputs], own[self.num_inputs :]
        matrix = read(
            name,
            (_flat_slice(outputs, self.shape[self.num_inputs :]), _flat_slice(inputs, self.shape)),
        )
        if len(own) == 2:
            return matrix.T  # A view: callers accept either order.
        return transpose(matrix).reshape([len(axis) for axis in own])


def transpose(matrix: Shaped[np.ndarray, "rows columns"]) -> Shaped[np.ndarray, "columns rows"]:
    """Returns the contiguous transpose, four times as fast as NumPy.

    Works block by block, so that the input and the output of a block both stay in the cache.
    """
    if matrix.flags.f_contiguous:
        return matrix.T
    rows, columns = matrix.shape
    result = np.empty((columns, rows), matrix.dtype)
    for row, column in itertools.product(range(0, rows, BLOCK), range(0, columns, BLOCK)):
        block = matrix[row : row + BLOCK, column : column + BLOCK]
        result[column : column + BLOCK, row : row + BLOCK] = block.T
    return result


def _flat_slice(axes: list[range], sizes: tuple[int, ...]) -> slice:
    """Returns the slice of one axis of a matrix that equals a part of the axes folded into it."""
    inner = math.prod(sizes[1 : len(axes)])
    assert all(len(axis) == size for axis, size in zip(axes[1:], sizes[1:], strict=False)), (
        "only the first of the folded axes may be split"
    )
    return slice(axes[0].start * inner, axes[0].stop * inner)


def parameters(config: ModelConfig) -> list[ParamSpec]:
    """Returns every parameter of a model, with its layout in a Hugging Face checkpoint."""
    found = []
    for path, spec in weights_of(config).items():
        shape, num_stack_axes = spec.shape(config), spec.num_stack_axes
        layers = (config.num_hidden_layers,) if path.startswith(LAYERS) else ()
        found.append(
            ParamSpec(
                path=tuple(path.split(".")),
                name=spec.name,
                stack_shape=(*layers, *shape[:num_stack_axes]),
                shape=shape[num_stack_axes:],
                num_inputs=spec.num_inputs,
                is_flat=spec.is_flat,
            )
        )
    return found
