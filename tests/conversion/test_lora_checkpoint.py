"""Checkpoints of low-rank updates: read, merged and exported with the model that they are of."""

import dataclasses
import shutil

from etils import epath
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grit_jax import GritLM
from grit_jax.conversion import ConversionError, HuggingFaceModel, LoraCheckpoint, open_model
from grit_jax.conversion.export import write_hugging_face
from grit_jax.conversion.orbax_model import write_orbax
from grit_jax.models import LoraConfig
from grit_jax.sharding import make_mesh
from grit_jax.training.checkpoints import Checkpoints, RetentionPolicy
from grit_jax.training.joint_loss import LossConfig, make_joint_loss
from grit_jax.training.train_step import Trainer

LORA = LoraConfig(rank=2, alpha=3.0, targets="*")


def save_updates(base, folder, **sizes):
    """Saves updates that are not 0 of a stored model, as a run does; returns its Flax module."""
    config = dataclasses.replace(base.config, lora=LORA, **sizes)
    mesh = make_mesh(devices=jax.devices()[:1])
    trainer = Trainer(config, make_joint_loss(LossConfig()), optax.sgd(0.1), mesh)
    with jax.default_prng_impl("rbg"):  # Compiled in a fifth of the time.
        state = trainer.state_from(base.load, seed=0)
    random = np.random.default_rng(0)
    shapes = flatten_dict(nnx.to_pure_dict(state.parameters))
    trained = {  # A projection, which not all of them have, comes last.
        path: jnp.asarray(0.2 * random.normal(size=shapes[path].shape), shapes[path].dtype)
        for path in sorted(shapes, key=lambda path: (-len(path), path))
    }
    nnx.replace_by_pure_dict(state.parameters, unflatten_dict(trained))
    description = {"lora": {**dataclasses.asdict(LORA), "base": base.fingerprint()}}
    where = epath.Path(folder / "checkpoints")
    with Checkpoints(
        where, config, description, 1, RetentionPolicy(keep=1), str(base.folder)
    ) as checkpoints:
        checkpoints.save(7, state)
    return trainer.model(state.model_parameters)


@pytest.fixture(scope="session")
def runs(saved_models, tmp_path_factory):
    """Folders of runs that trained updates of a Mistral and a Mixtral, and their Flax modules."""
    root = tmp_path_factory.mktemp("runs")
    return {
        name: (root / name, save_updates(open_model(saved_models[name]), root / name))
        for name in ("mistral", "mixtral")
    }


def content(model):
    return {
        parameter.path: model.read(parameter, tuple(slice(0, n) for n in parameter.full_shape))
        for parameter in model.parameters
    }


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "mixtral"])
def test_transformers_reads_the_export_as_the_adapted_model(runs, saved_models, tmp_path, name):
    import torch
    from transformers import AutoModelForCausalLM

    folder, adapted = runs[name]
    write_hugging_face(open_model(folder), tmp_path / "exported", dtype="float32")
    tokens = np.random.default_rng(0).integers(3, 32000, (2, 60))
    theirs, base = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (tmp_path / "exported", saved_models[name])
    )
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
        without = base(torch.tensor(tokens)).logits.numpy()
    read = GritLM.from_pretrained(
        folder, dtype="float32", mesh=make_mesh(devices=jax.devices()[:1])
    )
    largest = np.abs(expected).max()
    for module in (adapted, read.model):
        logits = jax.jit(lambda tokens, m=module: m.logits(m(tokens)))(tokens)
        np.testing.assert_allclose(logits, expected, atol=1e-4 * largest)
    assert np.abs(without - expected).max() > 0.1 * largest
    assert bytes_in(folder) < 0.1 * bytes_in(saved_models[name])


def test_any_part_of_a_merged_parameter_is_that_part_of_the_whole(runs):
    model = open_model(runs["mixtral"][0])
    for parameter in model.parameters:
        whole = model.read(parameter, tuple(slice(0, n) for n in parameter.full_shape))
        split = {0, parameter.num_inputs}  # Of an array's inputs, and of its outputs, the first.
        index = tuple(
            slice(n // 2, n // 2 + max(n // 4, 1)) if axis < 0 or axis in split else slice(0, n)
            for axis, n in enumerate(parameter.full_shape, start=-len(parameter.stack_shape))
        )
        np.testing.assert_allclose(model.read(parameter, index), whole[index], atol=1e-5)


def test_the_type_of_an_export_is_that_of_the_base_unless_another_is_named(runs, tmp_path):
    write_hugging_face(open_model(runs["mixtral"][0]), tmp_path / "exported")
    written = open_model(tmp_path / "exported")
    assert {written.dtype(parameter).name for parameter in written.parameters} == {"bfloat16"}
    for path, merged in content(open_model(runs["mixtral"][0])).items():
        ours = content(written)[path]
        np.testing.assert_array_equal(ours, merged.astype(ours.dtype))


def test_updates_of_a_checkpoint_and_updates_of_updates(runs, saved_models, tmp_path):
    write_orbax(HuggingFaceModel(saved_models["mistral"]), tmp_path / "base")
    save_updates(open_model(tmp_path / "base"), tmp_path / "first", embedding_projection_size=6)
    first = open_model(tmp_path / "first")
    of_safetensors = content(open_model(runs["mistral"][0]))
    once = content(first)
    projection = ("embedding_projection", "weight")
    assert once[projection].shape == (32, 6) and once[projection].any()
    for path, merged in of_safetensors.items():
        np.testing.assert_array_equal(once[path], merged)
    save_updates(first, tmp_path / "second")
    twice = content(open_model(tmp_path / "second"))
    before = content(open_model(tmp_path / "base"))
    gate = ("layers", "feed_forward", "gate")
    np.testing.assert_allclose(twice[gate] - once[gate], once[gate] - before[gate], atol=1e-6)
    np.testing.assert_array_equal(twice[("head",)], before[("head",)])
    assert open_model(tmp_path / "second").fingerprint() != first.fingerprint()


def test_a_base_that_is_gone_has_moved_or_is_another(saved_models, tmp_path):
    base, moved = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(saved_models["mistral"], base)
    save_updates(open_model(base), tmp_path / "run")
    before = content(open_model(tmp_path / "run"))
    base.rename(moved)
    with pytest.raises(ConversionError, match=f"low-rank updates of {base}: .*not there.*--base"):
        open_model(tmp_path / "run")
    opened = open_model(tmp_path / "run", base=moved)
    assert isinstance(opened, LoraCheckpoint)
    for path, array in content(opened).items():
        np.testing.assert_array_equal(array, before[path])
    write_orbax(HuggingFaceModel(moved), tmp_path / "orbax")
    with pytest.raises(ConversionError, match="is whole: there is no base"):
        open_model(tmp_path / "orbax", base=moved)
    # One number of one matrix is another.
    file = moved / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        ConversionError, match=r"does not hold the weights that .*/7 was trained on"
    ):
        open_model(tmp_path / "run", base=moved)
