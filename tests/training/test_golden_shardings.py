"""The sharding of the 7B and 8x7B states on a mesh, and the donation of their memory to a step.

After an intended change, rewrite the files: python tests/training/test_golden_shardings.py
"""

import json
import os
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
import pytest

from grit_jax.config_flags import parse_flags
from grit_jax.data.batch import Batch, ChatBatch, EmbeddingBatch, PackedTexts
from grit_jax.from_config import make_trainer

FOLDER = Path(__file__).parent / "golden"
CONFIGS = Path(__file__).parents[2] / "configs"
MESHES = {
    "gritlm_7b": {"slice": 2, "fsdp": 2, "tensor": 2},
    "gritlm_8x7b": {"fsdp": 2, "tensor": 2, "expert": 2},
}


def make(name):
    overrides = [f"--config.mesh.{axis}={size}" for axis, size in MESHES[name].items()]
    config, _ = parse_flags([f"--config={CONFIGS / name}.py", *overrides])
    return make_trainer(config)


def describe(state):
    """Returns shape, type, partition and bytes per device of every array, by path."""
    described = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        key = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        on_device = np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        spec = [list(axes) if isinstance(axes, tuple) else axes for axes in leaf.sharding.spec]
        described[key] = f"{leaf.dtype}{list(leaf.shape)} {spec} {int(on_device):,} bytes a device"
    return described


@pytest.mark.parametrize("name", MESHES)
def test_the_state_is_sharded_as_recorded(name):
    expected = json.loads((FOLDER / f"{name}.json").read_text())
    assert describe(make(name).abstract_state()) == expected


@pytest.mark.parametrize("name", MESHES)
def test_a_step_takes_over_the_memory_of_the_state_only(name):
    trainer = make(name)
    rows = jax.ShapeDtypeStruct((8, 256), np.int32)
    texts = PackedTexts(rows, rows, rows, jax.ShapeDtypeStruct((8, 256), np.bool_), num_texts=16)
    numbers = jax.ShapeDtypeStruct((16,), np.int32)
    embedding = EmbeddingBatch(texts, texts, numbers, numbers)
    batch = Batch({"embedding": embedding, "generative": ChatBatch(texts)})
    with jax.set_mesh(trainer.mesh):
        lowered = trainer.step.lower(trainer.abstract_state(), batch)
    of_state, of_batch = lowered.args_info[0]
    assert all(info.donated for info in jax.tree.leaves(of_state))
    assert not any(info.donated for info in jax.tree.leaves(of_batch))
    # Each array of the new state reuses the memory of an array of the old state.
    state, _ = lowered.out_info
    before = jax.tree.leaves(trainer.abstract_state())
    for old, new in zip(before, jax.tree.leaves(state), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)


if __name__ == "__main__":
    for each in MESHES:
        text = json.dumps(describe(make(each).abstract_state()), indent=1)
        (FOLDER / f"{each}.json").write_text(text + "\n")
