"""Where each parameter lies in a Hugging Face checkpoint, and how its axes lie there.

Hugging Face keeps a linear layer's weight as [out, in], a matrix for each layer and expert. Ours
are stacked over layers and experts, have the inputs first, and keep heads apart from their
dimension. Legend of dimensions: L layers, E experts, D hidden, N heads, K key/value heads, H head
dimension, F feed-forward, V vocabulary, P embedding.
"""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
import math

from jaxtyping import Shaped
import numpy as np

from grit_jax.models import ModelConfig, weights_of
from grit_jax.models.weights import LAYERS, PROJECTION_FOLDER

DENSE = PROJECTION_FOLDER

# Side of the squares that a matrix is transposed by.
SQUARE = 128

Index = tuple[slice, ...]
# Reads the part of a tensor that an index names: read(name, index).
Read = Callable[[str, Index], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter of ours, and the tensors of Hugging Face's that it is made of.

    Attributes:
      path: its path in the model, such as ("layers", "attention", "query").
      name: name of the tensors, with {layer} and {expert} where there are several.
      stacked: sizes of the axes that count layers and experts, in front of the others.
      shape: sizes of the other axes.
      num_inputs: how many of the other axes are inputs; 0 for what is no matrix of a linear layer.
    """

    path: tuple[str, ...]
    name: str
    stack_shape: tuple[int, ...]
    shape: tuple[int, ...]
    num_inputs: int = 0

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.stack_shape + self.shape

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor of Hugging Face's."""
        if not self.num_inputs:
            return self.shape
        inputs, outputs = self.shape[: self.num_inputs], self.shape[self.num_inputs :]
        return math.prod(outputs), math.prod(inputs)

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yields the place of each tensor in the stack, and its name."""
        for place in itertools.product(*map(range, self.stack_shape)):
            yield place, self._tensor_name(place)

    def read(self, index: Index, read: Read) -> Shaped[np.ndarray, "..."]:
        """Returns the part `index` of the parameter, reading no other part of the tensors."""
        bounds = [range(*i.indices(size)) for i, size in zip(index, self.full_shape, strict=True)]
        places, own = bounds[: len(self.stack_shape)], bounds[len(self.stack_shape) :]
        parts = [
            self._read_tensor(self._tensor_name(place), own, read)
            for place in itertools.product(*places)
        ]
        shape = [len(place) for place in places] + list(parts[0].shape)
        return parts[0].reshape(shape) if len(parts) == 1 else np.stack(parts).reshape(shape)

    def to_tensor(self, part: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Returns one layer's (and expert's) part of the parameter as Hugging Face's tensor."""
        if not self.num_inputs:
            return np.ascontiguousarray(part)
        rows, columns = self.tensor_shape
        return transposed(part.reshape(columns, rows))

    def _tensor_name(self, place: tuple[int, ...]) -> str:
        return self.name.format(**dict(zip(("layer", "expert"), place, strict=False)))

    def _read_tensor(self, name: str, own: list[range], read: Read) -> np.ndarray:
        if not self.num_inputs:
            return read(name, tuple(slice(axis.start, axis.stop) for axis in own))
        inputs, outputs = own[: self.num_inputs], own[self.num_inputs :]
        matrix = read(
            name, (_run(outputs, self.shape[self.num_inputs :]), _run(inputs, self.shape))
        )
        if len(own) == 2:
            return matrix.T  # A view: what reads on takes either order.
        return transposed(matrix).reshape([len(axis) for axis in own])


def transposed(matrix: Shaped[np.ndarray, "rows columns"]) -> Shaped[np.ndarray, "columns rows"]:
    """Returns the transpose, contiguous, made four times as fast as NumPy makes it.

    Square by square, so that what is read and what is written both stay in the cache.
    """
    if matrix.flags.f_contiguous:
        return matrix.T
    rows, columns = matrix.shape
    result = np.empty((columns, rows), matrix.dtype)
    for row, column in itertools.product(range(0, rows, SQUARE), range(0, columns, SQUARE)):
        square = matrix[row : row + SQUARE, column : column + SQUARE]
        result[column : column + SQUARE, row : row + SQUARE] = square.T
    return result


def _run(axes: list[range], sizes: tuple[int, ...]) -> slice:
    """Returns the rows of a matrix that a part of its unfolded axes is."""
    inner = math.prod(sizes[1 : len(axes)])
    assert all(len(axis) == size for axis, size in zip(axes[1:], sizes[1:], strict=False)), (
        "only the first of the axes that a matrix unfolds into is ever split"
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
            )
        )
    return found
