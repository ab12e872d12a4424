"""Loads a stored model as a Flax module on a mesh, optionally with int8 linear layers."""

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

from grit_jax.conversion import StoredModel
from grit_jax.conversion.layout import Index, ParamSpec
from grit_jax.models import Decoder, make_model
from grit_jax.models.linear import round_to_int8
from grit_jax.sharding import check_sizes_fit_mesh, variable_shardings


def load_module(
    stored: StoredModel, dtype: str, mesh: Mesh, linear_dtype: str | None = None
) -> Decoder:
    """Returns the Flax module of a stored model, sharded over a mesh.

    Args:
      stored: the model on disk.
      dtype: type of the parameters and of the computation.
      mesh: the devices.
      linear_dtype: "int8" to quantize the weights of linear layers while loading, or None.

    Raises:
      MeshError: the mesh does not divide the model's sizes.
    """
    config = dataclasses.replace(
        stored.config, dtype=dtype, param_dtype=dtype, linear_dtype=linear_dtype
    )
    check_sizes_fit_mesh(config.sharded_sizes(), mesh)
    graph, state = abstract_module(config, mesh)
    shapes = nnx.to_pure_dict(state)
    loaded = stored.load(shapes) if linear_dtype is None else _load_quantized(stored, shapes)
    nnx.replace_by_pure_dict(state, loaded)
    return nnx.merge(graph, state)


def abstract_module(config: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Returns the graph and the abstract state of a model: shapes, dtypes and shardings."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make_model(config, 0)))
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        variable_shardings(state, mesh),
    )
    return graph, shapes


def unstack_layers(model: Decoder, mesh: Mesh) -> Decoder:
    """Returns the model with one module per layer on a single CPU device; elsewhere, unchanged.

    XLA for CPUs copies a layer's weights out of the stack before it multiplies, which triples the
    memory traffic of decoding. The parameters of each layer are views of the stacked ones.
    """
    device = mesh.devices.flat[0]
    if mesh.devices.size > 1 or device.platform != "cpu":
        return model
    graph, layers = nnx.split(model.layers)

    def layer(index: int) -> nnx.Module:
        views = jax.tree.map(lambda stack: jax.device_put(np.asarray(stack)[index], device), layers)
        return nnx.merge(graph, views)

    unstacked = nnx.merge(*nnx.split(model))
    unstacked.layers = nnx.List(layer(index) for index in range(model.config.num_hidden_layers))
    return unstacked


def _load_quantized(stored: StoredModel, shapes: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters as global arrays, quantizing to int8 while reading.

    At most one layer of a parameter is in host memory unquantized.
    """
    by_path: dict[Any, Any] = dict(flatten_dict(shapes))
    loaded: dict[Any, Any] = {}

    def place(path: tuple[str, ...], read: Callable[[Index], np.ndarray]) -> None:
        shape = by_path[path]

        def read_shard(index: Index | None) -> np.ndarray:
            assert index is not None
            return read(index).astype(shape.dtype)

        loaded[path] = jax.make_array_from_callback(shape.shape, shape.sharding, read_shard)

    for parameter in stored.parameters:
        path = parameter.path
        if by_path[path].dtype != jnp.int8:
            place(path, lambda index, parameter=parameter: stored.read(parameter, index))
            continue
        quantized = _QuantizedParameter(stored, parameter)
        place(path, quantized.weights)
        place((*path[:-1], f"{path[-1]}_scale"), quantized.scales)
    stored.check_finite(unflatten_dict(loaded))
    return unflatten_dict(loaded)


class _QuantizedParameter:
    """Shards of one stacked linear layer in int8, and of its scales.

    The scale of an output depends on all of its inputs, even if a shard has only some of them.
    """

    def __init__(self, stored: StoredModel, parameter: ParamSpec):
        self._stored, self._parameter = stored, parameter
        self._last: tuple[str, tuple[np.ndarray, np.ndarray]] | None = None

    def weights(self, index: Index) -> np.ndarray:
        """Returns a shard of the weights."""
        num_stack_axes = len(self._parameter.stack_shape)
        inputs = index[num_stack_axes : num_stack_axes + self._parameter.num_inputs]
        weights, _ = self._quantize(index)
        return weights[(*(slice(None),) * num_stack_axes, *inputs)]

    def scales(self, index: Index) -> np.ndarray:
        """Returns a shard of the scales."""
        return self._quantize(index)[1]

    def _quantize(self, index: Index) -> tuple[np.ndarray, np.ndarray]:
        """Returns weights and scales of an index's layers and outputs, with all inputs."""
        parameter = self._parameter
        sizes = parameter.full_shape
        num_stack_axes, num_inputs = len(parameter.stack_shape), parameter.num_inputs
        outputs = index[num_stack_axes + num_inputs :]
        inputs = tuple(slice(0, size) for size in parameter.shape[:num_inputs])
        stack = [
            range(*i.indices(size)) for i, size in zip(index, sizes[:num_stack_axes], strict=False)
        ]
        key = str((stack, outputs))
        if self._last is None or self._last[0] != key:
            layers = [
                self._quantize_layer(layer, (*inputs, *outputs))
                for layer in itertools.product(*stack)
            ]
            shape = [len(indices) for indices in stack]
            stacked = (np.stack(arrays) for arrays in zip(*layers, strict=True))
            weights, scales = (array.reshape(*shape, *array.shape[1:]) for array in stacked)
            self._last = key, (weights, scales)
        return self._last[1]

    def _quantize_layer(
        self, layer: tuple[int, ...], index: Index
    ) -> tuple[np.ndarray, np.ndarray]:
        index = (*(slice(i, i + 1) for i in layer), *index)
        weights = self._stored.read(self._parameter, index)
        weights = weights.reshape(weights.shape[len(layer) :])
        with np.errstate(invalid="ignore"):  # The scales are checked.
            return round_to_int8(weights, self._parameter.num_inputs)
