"""LoRA training: which parameters change, and how checkpoints are saved and resumed."""

import dataclasses
import math
from pathlib import Path
import re
import shutil

from etils import epath
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import numpy as np
import optax
import pytest
from small_batches import SIZES, make_batch, only

from grit_jax.config_flags import parse_flags
from grit_jax.conversion import LoraCheckpoint, open_model
from grit_jax.from_config import make_trainer
from grit_jax.models import LoraConfig, ModelConfig, make_config, weights_of
from grit_jax.models.weights import linear_layers
from grit_jax.run import run
from grit_jax.sharding import batch_shards, make_mesh
from grit_jax.training.checkpoints import CheckpointError, Checkpoints, RetentionPolicy
from grit_jax.training.hooks.metrics import read_metrics
from grit_jax.training.joint_loss import LossConfig, make_joint_loss
from grit_jax.training.train_step import Trainer

ROOT = Path(__file__).parents[2]
LORA = LoraConfig(rank=3, alpha=6.0, targets="*")
LOSS = make_joint_loss(LossConfig(temperature=0.1, learn_temperature=True))


def is_update(path):
    return path[-2].endswith("_lora")


def load(shapes):
    """Returns the parameters of a base model, like `StoredModel.load`."""
    random = np.random.default_rng(0)
    stored = {}
    for path, shape in flatten_dict(shapes).items():
        if len(path) > 1 and (is_update(path) or path[0] == "embedding_projection"):
            continue
        value = 1.0 if path[-1] == "scale" else 0.2 * random.normal(size=shape.shape)
        value = np.broadcast_to(value, shape.shape).astype(shape.dtype)
        stored[path] = jax.device_put(value, shape.sharding)
    return unflatten_dict(stored)


def start_of(trainer):
    with jax.default_prng_impl("rbg"):  # Compiles in a fifth of the time.
        return trainer.state_from(load, seed=0)


def leaves(state):
    """Returns arrays by path, on the host."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): np.array(x)
        for path, x in jax.tree.leaves_with_path(state)
    }


@pytest.fixture(scope="module")
def trainer():
    config = ModelConfig(**SIZES, lora=LORA, embedding_projection_size=12, param_dtype="bfloat16")
    return Trainer(config, LOSS, optax.adam(0.01), make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def continued(trainer, tmp_path_factory):
    """The states of three steps, and a folder with a checkpoint of the second."""
    folder = epath.Path(tmp_path_factory.mktemp("run"))
    state = start_of(trainer)
    states = [leaves(state)]
    for step in range(3):
        state = one_step(trainer, state, step)
        states.append(leaves(state))
        if step == 1:
            with open_checkpoints(folder, trainer) as checkpoints:
                checkpoints.save(2, state)
    return states, folder


def one_step(trainer, state, step):
    with jax.set_mesh(trainer.mesh):
        return trainer.step(state, trainer.to_devices(embedding_batch(step)))[0]


def embedding_batch(seed, shards=1):
    """Returns a batch without chats, whose step compiles in half of the time."""
    return only(make_batch(seed, shards)[0], "embedding")


def open_checkpoints(folder, trainer):
    return Checkpoints(folder, trainer.model_config, {}, 1, RetentionPolicy(keep=1), "/base")


@pytest.mark.slow
def test_a_step_changes_the_updates_and_not_the_base_model(trainer, continued):
    (first, *_, last), _ = continued
    abstract = trainer.abstract_state()
    frozen = flatten_dict(nnx.to_pure_dict(abstract.frozen))
    trained = flatten_dict(nnx.to_pure_dict(abstract.parameters))
    assert len(frozen) == 12 and not any("lora" in str(path) for path in frozen)
    layers = linear_layers(weights_of(trainer.model_config))
    assert trained.keys() == {
        ("embedding_projection", "weight"),
        ("embedding_projection", "bias"),
        *(("layers", *f"{name}_lora".split("."), matrix) for name in layers for matrix in "ab"),
    }
    assert {str(leaf.dtype) for path, leaf in trained.items() if is_update(path)} == {"float32"}
    assert {str(leaf.dtype) for leaf in frozen.values()} == {"bfloat16"}
    for path in frozen:
        name = "/".join(("frozen", *path))
        np.testing.assert_array_equal(first[name], last[name])
    moved = ["/".join(("parameters", *path)) for path in trained]
    for name in [*moved, "loss_parameters/log_temperature"]:
        assert not np.array_equal(first[name], last[name]), name
    # Two moments per trained parameter.
    moments = sum(leaf.size for leaf in jax.tree.leaves(abstract.optimizer_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in trained.values())


def test_a_checkpoint_of_the_updates_resumes_bit_for_bit(trainer, continued):
    states, folder = continued
    with open_checkpoints(folder, trainer) as checkpoints:
        restored = checkpoints.restore(trainer.abstract_state())
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(restored.frozen))
    restored = dataclasses.replace(restored, frozen=start_of(trainer).frozen)
    ours = [leaves(restored), leaves(one_step(trainer, restored, 2))]
    for state, expected in zip(ours, states[2:], strict=True):
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(state[name], value, err_msg=name)


def test_no_gradient_of_a_frozen_weight_is_computed():
    sizes = SIZES | {"hidden_size": 40, "intermediate_size": 56}  # Sizes of no other array.
    batch = make_batch(seed=0)[0]
    products = {}
    for lora in (None, LORA):
        config = make_config("mixtral", **sizes, num_local_experts=4, lora=lora)
        trainer = Trainer(config, LOSS, optax.sgd(1.0), make_mesh(devices=jax.devices()[:1]))
        with jax.set_mesh(trainer.mesh):
            lowered = trainer.step.lower(trainer.abstract_state(), batch)
        # Shapes of the weights of layers, experts and head, transposed or not.
        shapes = "40x4x8|4x8x40|40x56|56x40|40x64|64x40"
        products[lora] = re.findall(rf"dot_general.*-> tensor<({shapes})x", lowered.as_text())
    assert len(products[None]) > 10
    assert not products[LORA]


def gradient_of(config, mesh, num_chunks):
    """Returns the gradient of a step from nonzero updates, by SGD with learning rate 1."""
    trainer = Trainer(config, LOSS, optax.sgd(1.0), mesh, num_chunks)
    state = start_of(trainer)
    random = np.random.default_rng(0)
    parameters = {
        path: 0.2 * random.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in flatten_dict(nnx.to_pure_dict(state.parameters)).items()
    }
    nnx.replace_by_pure_dict(
        state.parameters,
        jax.device_put(unflatten_dict(parameters), nnx.to_pure_dict(trainer.shardings.parameters)),
    )
    before = leaves(state.trained)
    batch = embedding_batch(0, shards=16)
    with jax.set_mesh(mesh):
        state, metrics = trainer.step(state, trainer.to_devices(batch))
    after = leaves(state.trained)
    return metrics, {name: before[name] - after[name] for name in before}, state


@pytest.mark.slow
def test_eight_devices_in_chunks_have_the_gradient_of_one_device():
    config = make_config("mixtral", **SIZES, lora=LORA, num_local_experts=4, remat="none")
    on_eight = make_mesh(fsdp=2, tensor=2, expert=2)
    assert batch_shards(on_eight) * 2 <= 16
    one_metrics, expected, _ = gradient_of(config, make_mesh(devices=jax.devices()[:1]), 1)
    config = dataclasses.replace(config, remat="save_matmuls")
    metrics, gradient, state = gradient_of(config, on_eight, 2)
    for name, value in one_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    assert gradient.keys() == expected.keys()
    for name, value in expected.items():
        largest = np.abs(value).max()
        assert largest > 0, name
        np.testing.assert_allclose(gradient[name], value, atol=1e-4 * largest, err_msg=name)
    layers = state.parameters["layers"]
    for layer, shards in (("attention.query", 2), ("feed_forward.gate", 4)):
        module, name = layer.split(".")
        for matrix in "ab":
            array = layers[module][f"{name}_lora"][matrix][...]
            on_device = math.prod(array.sharding.shard_shape(array.shape))
            assert on_device == array.size // shards, (layer, matrix)


@pytest.mark.slow
def test_a_run_resumes_only_with_the_base_model_it_started_from(prepared_sample, tmp_path):
    base, other = save_bases(tmp_path / "bases")
    run_on(base, prepared_sample, tmp_path / "whole")
    expected = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    measured = {line["step"] for line in expected if "held_out/perplexity" in line}
    assert measured == {0, 2}

    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "2")
    base.rename(tmp_path / "moved")  # The base is identified by its content.
    run_on(tmp_path / "moved", prepared_sample, tmp_path / "stopped")
    losses = [
        [line["loss"] for line in lines if "loss" in line]
        for lines in (expected, read_metrics(tmp_path / "stopped" / "metrics.jsonl"))
    ]
    assert len(losses[0]) == 2 and losses[0] == losses[1]
    saved = open_model(tmp_path / "stopped")
    assert saved.folder.name == "2" and isinstance(saved, LoraCheckpoint)

    for base, settings, named in (
        (other, {}, "lora.base was"),
        (tmp_path / "moved", {"rank": 3}, "config.lora.rank was 2 and is 3"),
        (tmp_path / "moved", {"targets": "*.down"}, r"config.lora.targets was 'attention.\*,"),
        (tmp_path / "moved", {"rank": 0}, "config.lora.rank was 2 and is None"),
    ):
        with pytest.raises(CheckpointError, match=named):
            run_on(base, prepared_sample, tmp_path / "stopped", **settings)


def small_config(prepared_sample, **fields):
    config = [
        f"--config={ROOT / 'configs' / 'gritlm_tiny.py'}",
        "--config.model.sizes.hidden_size=32",
        "--config.model.sizes.intermediate_size=32",
        "--config.model.sizes.head_dim=8",
        "--config.mode=generative",  # One stream is compiled in half of the time.
        f"--config.data.folder={prepared_sample}",
        "--config.optimizer.warmup_ratio=0.0",
        "--config.steps=2",
        "--config.log_every_steps=1",
        "--config.checkpoint.every_steps=1",
    ]
    config += [f"--config.{name}={value}" for name, value in fields.items()]
    return parse_flags(config)[0]


def save_bases(folder):
    """Saves two models as checkpoints; returns their folders."""
    trainer = make_trainer(small_config(""))
    with jax.default_prng_impl("rbg"):
        state = trainer.initial_state(0)
    config, keep = trainer.model_config, RetentionPolicy(keep=2)
    with Checkpoints(epath.Path(folder), config, {}, 1, keep) as saved:
        saved.save(1, state)
        saved.save(2, jax.tree.map(lambda array: array * 2, state))
    return folder / "1", folder / "2"


def run_on(base, prepared_sample, workdir, **settings):
    lora = {f"lora.{name}": value for name, value in {"rank": 2, **settings}.items()}
    config = small_config(prepared_sample, **{"model.weights": base, **lora})
    run(config, epath.Path(workdir))
