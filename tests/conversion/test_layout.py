"""Reading any part of any parameter reads only the bytes it needs."""

import math

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax.sharding import NamedSharding
import numpy as np
import pytest
import reference_values

from grit_jax.conversion import HuggingFaceModel
from grit_jax.conversion.layout import parameters
from grit_jax.models import make_model
from grit_jax.sharding import make_mesh, variable_shardings

FOLDERS = {name: reference_values.FOLDER / f"tiny-{name}" for name in ("mistral", "mixtral")}


@pytest.fixture(scope="module", params=["mistral", "mixtral"])
def opened(request):
    """The original's tiny model, and its weights in our layout by independent code."""
    model = HuggingFaceModel(FOLDERS[request.param])
    expected = nnx.to_pure_dict(nnx.state(reference_values.load_model(request.param)))
    return model, expected


def lookup(tree, path):
    for key in path:
        tree = tree[key]
    return np.asarray(tree)


def whole(parameter):
    return tuple(slice(0, size) for size in parameter.full_shape)


def test_whole_parameters(opened):
    model, expected = opened
    assert len(model.parameters) == len(jax.tree.leaves(expected))
    for parameter in model.parameters:
        np.testing.assert_array_equal(
            model.read(parameter, whole(parameter)), lookup(expected, parameter.path)
        )


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_part_that_a_mesh_may_ask_for(opened, data):
    model, expected = opened
    parameter = data.draw(st.sampled_from(model.parameters))
    index = []
    first_of_matrix = len(parameter.stack_shape)
    first_output = first_of_matrix + parameter.num_inputs
    for axis, size in enumerate(parameter.full_shape):
        # Of several axes that a matrix unfolds into, only the first is ever split.
        is_inner = parameter.num_inputs and axis > first_of_matrix and axis != first_output
        start = 0 if is_inner else data.draw(st.integers(0, size - 1))
        stop = size if is_inner else data.draw(st.integers(start + 1, size))
        index.append(slice(start, stop))
    part = model.read(parameter, tuple(index))
    np.testing.assert_array_equal(part, lookup(expected, parameter.path)[tuple(index)])


def test_a_tensor_written_is_the_tensor_read(opened):
    model, expected = opened
    for parameter in model.parameters:
        value = lookup(expected, parameter.path)
        for index, name in parameter.tensors():
            stored = model._weights.read(name, (slice(None),) * len(parameter.tensor_shape))
            np.testing.assert_array_equal(parameter.to_tensor(value[index]), stored)


def test_each_device_reads_its_own_part_of_the_weights(opened, monkeypatch):
    model, expected = opened
    has_experts = len(model.parameters[-1].stack_shape) == 2
    mesh = make_mesh(fsdp=2, tensor=2, expert=2) if has_experts else make_mesh(fsdp=4, tensor=2)
    shapes = nnx.eval_shape(lambda: nnx.state(make_model(model.config, 0)))
    shardings = nnx.to_pure_dict(variable_shardings(shapes, mesh))
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nnx.to_pure_dict(shapes),
        shardings,
    )
    bytes_read = {}
    original_read = HuggingFaceModel.read

    def counting(self, parameter, index):
        part = original_read(self, parameter, index)
        bytes_read[parameter.path] = bytes_read.get(parameter.path, 0) + part.nbytes
        return part

    tensor_bytes = []
    read_tensor = type(model._weights).read

    def counting_tensor(self, name, index):
        part = read_tensor(self, name, index)
        tensor_bytes.append(part.nbytes)
        return part

    monkeypatch.setattr(HuggingFaceModel, "read", counting)
    monkeypatch.setattr(type(model._weights), "read", counting_tensor)
    loaded = model.load(shapes)
    for parameter in model.parameters:
        value, sharding = lookup(expected, parameter.path), lookup_leaf(shardings, parameter.path)
        np.testing.assert_array_equal(lookup(loaded, parameter.path), value)
        num_shards = math.prod(mesh.shape[axis] for axis in flat_axes(sharding))
        # Each distinct part once a device that holds it, never more.
        assert bytes_read[parameter.path] <= value.nbytes * 8 // num_shards
    assert sum(tensor_bytes) == sum(bytes_read.values())


def lookup_leaf(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def flat_axes(sharding: NamedSharding):
    for entry in sharding.spec:
        yield from () if entry is None else (entry,) if isinstance(entry, str) else entry


@pytest.mark.parametrize("name", ["mistral", "mixtral"])
def test_every_parameter_of_the_model_is_in_the_table(name):
    model = reference_values.load_model(name)
    shapes = {
        path: variable.shape for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    assert {p.path: p.full_shape for p in parameters(model.config)} == shapes
