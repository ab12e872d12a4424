"""A stored model as a Flax module on the devices, in its own type or with linear layers in int8."""

from collections.abc import Callable
import dataclasses
import itertools
from typing import Any

from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from grit_jax.conversion import Model
from grit_jax.conversion.layout import Index, ParamSpec
from grit_jax.models import Decoder, make_model
from grit_jax.models.linear import round_to_int8
from grit_jax.sharding import check_sizes_fit_mesh, variable_shardings


def load_module(stored: Model, dtype: str, mesh: Mesh, linear_dtype: str | None = None) -> Decoder:
    """Returns the Flax module of a stored model, laid out on a mesh by the table of shardings.

    Raises:
      MeshError: the mesh does not divide the model.
    """
    config = dataclasses.replace(
        stored.config, dtype=dtype, param_dtype=dtype, linear_dtype=linear_dtype
    )
    check_sizes_fit_mesh(config.sharded_sizes(), mesh)
    graph, state = abstract_module(config, mesh)
    shapes = nnx.to_pure_dict(state)
    loaded = stored.load(shapes) if linear_dtype is None else _load_rounded(stored, shapes)
    nnx.replace_by_pure_dict(state, loaded)
    return nnx.merge(graph, state)


def abstract_module(config: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Returns graph and state of a model without values: shapes, types and shardings."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make_model(config, 0)))
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        variable_shardings(state, mesh),
    )
    return graph, shapes


def _load_rounded(stored: Model, shapes: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters as global arrays, those that are to be int8 rounded as they are read.

    No more of a parameter than one layer is in the host's memory unrounded.
    """
    by_path: dict[Any, Any] = dict(flatten_dict(shapes))
    loaded: dict[Any, Any] = {}

    def place(path: tuple[str, ...], read: Callable[[Index], np.ndarray]) -> None:
        shape = by_path[path]

        def part(index: Index | None) -> np.ndarray:
            assert index is not None
            return read(index).astype(shape.dtype)

        loaded[path] = jax.make_array_from_callback(shape.shape, shape.sharding, part)

    for parameter in stored.parameters:
        path = parameter.path
        if by_path[path].dtype != jnp.int8:
            place(path, lambda index, parameter=parameter: stored.read(parameter, index))
            continue
        rounded = _Rounded(stored, parameter)
        place(path, rounded.matrix)
        place((*path[:-1], f"{path[-1]}_scale"), rounded.scale)
    return unflatten_dict(loaded)


class _Rounded:
    """The linear layers of one parameter in int8, and their scales, by parts.

    A scale is that of all inputs of an output, whatever part of them a device holds.
    """

    def __init__(self, stored: Model, parameter: ParamSpec):
        self._stored, self._parameter = stored, parameter
        self._last: tuple[str, tuple[np.ndarray, np.ndarray]] | None = None

    def matrix(self, index: Index) -> np.ndarray:
        """Returns a part of W."""
        first = len(self._parameter.stack_shape)
        inputs = index[first : first + self._parameter.num_inputs]
        matrix, _ = self._of_outputs(index)
        return matrix[(*(slice(None),) * first, *inputs)]

    def scale(self, index: Index) -> np.ndarray:
        """Returns a part of the scales."""
        return self._of_outputs(index)[1]

    def _of_outputs(self, index: Index) -> tuple[np.ndarray, np.ndarray]:
        """Returns W and its scales for the layers and outputs of an index, and all inputs."""
        parameter = self._parameter
        sizes = parameter.full_shape
        first, num_inputs = len(parameter.stack_shape), parameter.num_inputs
        outputs = index[first + num_inputs :]
        inputs = tuple(slice(0, size) for size in parameter.shape[:num_inputs])
        stacked = [range(*i.indices(size)) for i, size in zip(index, sizes[:first], strict=False)]
        key = str((stacked, outputs))
        if self._last is None or self._last[0] != key:
            parts = [
                self._round(place, (*inputs, *outputs)) for place in itertools.product(*stacked)
            ]
            shape = [len(places) for places in stacked]
            whole = (np.stack(part) for part in zip(*parts, strict=True))
            matrix, scale = (array.reshape(*shape, *array.shape[1:]) for array in whole)
            self._last = key, (matrix, scale)
        return self._last[1]

    def _round(self, place: tuple[int, ...], own: Index) -> tuple[np.ndarray, np.ndarray]:
        index = (*(slice(i, i + 1) for i in place), *own)
        part = self._stored.read(self._parameter, index)
        return round_to_int8(part.reshape(part.shape[len(place) :]), self._parameter.num_inputs)
