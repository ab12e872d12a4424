"""The mesh, and what is said when devices or a model do not fit it."""

import itertools

import jax
from jax.sharding import PartitionSpec
import pytest

from grit_jax.models import ModelConfig, make_config
from grit_jax.sharding import (
    LOGICAL_AXIS_RULES,
    MESH_AXES,
    MeshError,
    batch_shards,
    make_mesh,
    partition_spec,
)
from grit_jax.training.train_step import check_model_fits_mesh


def sizes(mesh):
    assert mesh.axis_names == MESH_AXES
    return tuple(mesh.shape.values())


def test_the_tests_have_eight_devices():
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (1, 8, 1, 1)),
        ({"tensor": 2}, (1, 4, 2, 1)),
        ({"slice": 2, "tensor": 2}, (2, 2, 2, 1)),
        ({"slice": -1, "fsdp": 2}, (4, 2, 1, 1)),
        ({"fsdp": 1, "expert": -1}, (1, 1, 1, 8)),
        ({"slice": 1, "fsdp": 4, "tensor": 1, "expert": 2}, (1, 4, 1, 2)),
        ({"fsdp": -1, "tensor": 8}, (1, 1, 8, 1)),
    ],
)
def test_a_free_size_is_what_the_others_leave(asked, expected):
    assert sizes(make_mesh(**asked)) == expected


def test_a_mesh_over_some_of_the_devices():
    mesh = make_mesh(devices=jax.devices()[:2])
    assert sizes(mesh) == (1, 2, 1, 1)
    assert set(mesh.devices.flat) == set(jax.devices()[:2])


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"slice": -1}, "at most one may be -1"),
        ({"fsdp": 0}, "sizes must be positive"),
        ({"tensor": -2}, "sizes must be positive"),
        ({"tensor": 3}, "a multiple of 3 devices, but there are 8"),
        ({"fsdp": 4}, "needs 4 devices, but there are 8"),
        ({"fsdp": 16}, "needs 16 devices, but there are 8"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_named(asked, problem):
    with pytest.raises(MeshError, match=problem) as error:
        make_mesh(**asked)
    name, size = next(iter(asked.items()))
    assert str(error.value).startswith("config.mesh: ")
    assert f"{name}={size}" in str(error.value)


def test_rows_are_split_over_all_axes_but_tensor():
    assert partition_spec("batch", None) == PartitionSpec(("slice", "fsdp", "expert"), None)
    mesh = make_mesh(slice=2, fsdp=1, tensor=2, expert=2)
    assert batch_shards(mesh) == 4
    assert batch_shards(make_mesh(fsdp=1, tensor=8)) == 1


def test_every_rule_names_axes_of_the_mesh():
    named = [
        rule if isinstance(rule, tuple) else (rule,) for rule in LOGICAL_AXIS_RULES.values() if rule
    ]
    assert set(itertools.chain(*named)) == set(MESH_AXES)


TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    ("config", "mesh", "named"),
    [
        (ModelConfig(**TINY | {"hidden_size": 60}), {"fsdp": 8}, "hidden_size=60"),
        (
            ModelConfig(**TINY | {"num_key_value_heads": 2}),
            {"fsdp": -1, "tensor": 4},
            "num_key_value_heads=2",
        ),
        (
            ModelConfig(**TINY | {"num_attention_heads": 2, "num_key_value_heads": 2}),
            {"fsdp": -1, "tensor": 4},
            "num_attention_heads=2",
        ),
        (
            ModelConfig(**TINY | {"intermediate_size": 65}),
            {"fsdp": -1, "tensor": 2},
            "intermediate_size=65",
        ),
        (ModelConfig(**TINY | {"vocab_size": 63}), {"fsdp": -1, "tensor": 2}, "vocab_size=63"),
        (
            make_config("mixtral", **TINY, num_local_experts=6),
            {"fsdp": -1, "expert": 4},
            "num_local_experts=6",
        ),
        (ModelConfig(**TINY), {"fsdp": -1, "expert": 2}, "expert"),
    ],
)
def test_a_model_that_the_mesh_does_not_divide_names_both_fields(config, mesh, named):
    axis, size = list(mesh.items())[-1]
    with pytest.raises(MeshError) as error:
        check_model_fits_mesh(config, make_mesh(**mesh))
    assert f"config.mesh.{axis}={size}" in str(error.value)
    assert named in str(error.value)


def test_a_model_that_the_mesh_divides_is_welcome():
    check_model_fits_mesh(ModelConfig(**TINY), make_mesh(fsdp=2, tensor=4))
    check_model_fits_mesh(make_config("mixtral", **TINY), make_mesh(fsdp=1, tensor=2, expert=4))
