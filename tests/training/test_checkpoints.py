"""Checkpoints: retention, recovery from damage, refusal of other runs, and atomic saves."""

import contextlib
import errno
import gc
import json
import math
import os
from pathlib import Path
import resource
import subprocess
import sys
import textwrap
import warnings

from etils import epath
import jax
import numpy as np
import optax
import pytest
import tensorstore

from grit_jax.bucket import is_transient_storage_error
from grit_jax.consistency import describe_differences
from grit_jax.conversion import OrbaxModel
from grit_jax.models import ModelConfig
from grit_jax.sharding import make_mesh
from grit_jax.training.checkpoint_recovery import DamagedCheckpointWarning, is_damage
from grit_jax.training.checkpoints import CheckpointError, Checkpoints, RetentionPolicy
from grit_jax.training.joint_loss import LossConfig, make_joint_loss
from grit_jax.training.train_step import Trainer

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=4,
)
DESCRIPTION = {"data": {"seed": 0, "embedding": {"senses": {"rate": 0.5}}}}


@pytest.fixture(scope="module")
def trainer():
    mesh = make_mesh(devices=jax.devices()[:1])
    loss = make_joint_loss(LossConfig(learn_temperature=True))
    return Trainer(CONFIG, loss, optax.adam(0.1), mesh)


@pytest.fixture(scope="module")
def states(trainer):
    """States that a run could have after steps 1 to 6."""
    first = trainer.initial_state(0)
    shardings = trainer.shardings
    return {
        step: jax.device_put(jax.tree.map(lambda array, n=step: array + n, first), shardings)
        for step in range(1, 7)
    }


def open_folder(folder, description=DESCRIPTION, config=CONFIG, **retention):
    return Checkpoints(
        epath.Path(folder), config, description, 1, RetentionPolicy(**{"keep": 10} | retention)
    )


def save_all(folder, states, **retention):
    with open_folder(folder, **retention) as checkpoints:
        for step, state in states.items():
            recall = -abs(step - 3)
            unsteady = math.nan if step == 4 else recall
            checkpoints.save(step, state, metrics={"recall": recall, "unsteady": unsteady})
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def assert_same(ours, expected):
    ours = dict(jax.tree.leaves_with_path((ours.trained, ours.optimizer_state)))
    expected = dict(jax.tree.leaves_with_path((expected.trained, expected.optimizer_state)))
    assert ours.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(ours[path], leaf)
        assert ours[path].sharding == leaf.sharding


def test_the_newest_comes_back_to_the_bit(trainer, states, tmp_path):
    save_all(tmp_path, states)
    with open_folder(tmp_path) as checkpoints:
        restored = checkpoints.restore(trainer.abstract_state())
    assert int(restored.step) == 6
    assert_same(restored, states[6])


def test_how_a_model_is_used_makes_no_other_run_of_it(trainer, states, tmp_path):
    save_all(tmp_path, {1: states[1]})  # As an older version does, which does not say it.
    usage = {"grit": {"attention": "cccc"}, "eos_token_id": 7}
    with Checkpoints(
        epath.Path(tmp_path), CONFIG, DESCRIPTION, 1, RetentionPolicy(keep=10),
        usage=usage, tokenizer={"tokenizer.json": b"{}", "another": b"2"},
    ) as checkpoints:  # fmt: skip
        assert int(checkpoints.restore(trainer.abstract_state()).step) == 1
        checkpoints.save(2, states[2])
    with open_folder(tmp_path) as checkpoints:
        assert int(checkpoints.restore(trainer.abstract_state()).step) == 2
    fields = OrbaxModel(tmp_path / "2").fields
    assert fields | usage == fields
    assert (tmp_path / "2" / "tokenizer" / "another").read_bytes() == b"2"
    assert not (tmp_path / "1" / "tokenizer").exists()


def test_a_run_of_an_older_version_is_continued(trainer, states, tmp_path):
    before = {**DESCRIPTION, "trained": {"param_dtype": "float32", "moment_dtype": "float32"}}
    with open_folder(tmp_path, before) as checkpoints:
        checkpoints.save(1, states[1])
    now = {**DESCRIPTION, "trained": {"param_dtype": "float32", "mu_dtype": "float32"}}
    with open_folder(tmp_path, now) as checkpoints:
        assert_same(checkpoints.restore(trainer.abstract_state()), states[1])
    now["trained"]["mu_dtype"] = "bfloat16"
    with (
        open_folder(tmp_path, now) as checkpoints,
        pytest.raises(
            CheckpointError, match=r"config\.optimizer\.mu_dtype was 'float32' and is 'bfloat16'"
        ),
    ):
        checkpoints.restore(trainer.abstract_state())


def test_without_one_there_is_none(trainer, tmp_path):
    with open_folder(tmp_path / "new") as checkpoints:
        assert checkpoints.latest_step is None
        assert checkpoints.restore(trainer.abstract_state()) is None


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        ({"keep": 2}, [5, 6]),
        ({"keep": 1, "keep_every_steps": 2}, [2, 4, 6]),
        ({"keep": 1, "best_metric": "recall"}, [3, 6]),
        ({"keep": 1, "best_metric": "recall", "best_mode": "min"}, [6]),
        ({"keep": 1, "best_metric": "unsteady"}, [3, 6]),
        ({"keep": 1, "best_metric": "unsteady", "best_mode": "min"}, [6]),
        ({"keep": 1, "keep_every_steps": 4, "best_metric": "recall"}, [3, 4, 6]),
    ],
    ids=str,
)
def test_those_are_kept_that_any_rule_keeps(states, tmp_path, retention, kept):
    assert save_all(tmp_path, states, **retention) == kept


def test_the_best_is_kept_in_a_run_that_is_continued(states, tmp_path):
    best = {"keep": 1, "best_metric": "recall"}
    assert save_all(tmp_path, {step: states[step] for step in (2, 3, 4)}, **best) == [3, 4]
    assert save_all(tmp_path, {5: states[5]}, **best) == [3, 5]
    (tmp_path / "3" / "metrics" / "metrics").write_bytes(b"\0\0")  # As a power cut leaves it.
    assert save_all(tmp_path, {6: states[6]}, **best) == [5, 6]


def cut_off(folder):
    for path in sorted(folder.rglob("d/*")):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_arrays(folder):
    for path in folder.rglob("manifest.ocdbt"):
        path.unlink()


def empty_description(folder):
    for path in (folder / "description").iterdir():
        path.write_text("")


@pytest.mark.parametrize("damage", [cut_off, lose_arrays, empty_description])
def test_a_damaged_one_is_set_aside_and_the_one_before_taken(trainer, states, tmp_path, damage):
    save_all(tmp_path, {step: states[step] for step in (1, 2)})
    damage(tmp_path / "2")
    with open_folder(tmp_path) as checkpoints:
        with pytest.warns(DamagedCheckpointWarning, match="step 2 cannot be read"):
            restored = checkpoints.restore(trainer.abstract_state())
        assert int(restored.step) == 1
        assert_same(restored, states[1])
        # The run comes to step 2 again, and saves it.
        checkpoints.save(2, states[2])
    assert (tmp_path / "damaged" / "2").is_dir()
    with open_folder(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(trainer.abstract_state()), states[2])


@contextlib.contextmanager
def no_more_files():
    """A context manager in which this process cannot open more files."""
    gc.collect()  # Else files that nobody holds any more may be closed, and others opened.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 1, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def steps_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


# Without a file there is no event loop, and Orbax leaves coroutines that nobody awaits.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_cannot_be_read_for_now_stays_and_ends_the_run(trainer, states, tmp_path):
    save_all(tmp_path, {step: states[step] for step in (1, 2)})
    of_sgd = Trainer(CONFIG, trainer.loss, optax.sgd(0.1), trainer.mesh)
    for abstract, context, named in (
        (trainer.abstract_state(), no_more_files(), "Too many open files"),
        (of_sgd.abstract_state(), contextlib.nullcontext(), "tree structures do not match"),
    ):
        with (
            open_folder(tmp_path) as checkpoints,
            pytest.raises(CheckpointError, match=f"{tmp_path}/2 cannot be read: .*{named}"),
            context,
        ):
            checkpoints.restore(abstract)
    gc.collect()  # Here, not in another test.
    assert steps_in(tmp_path) == ["1", "2"]


def test_what_tensorstore_says_of_the_system_is_no_damage(states, tmp_path):
    save_all(tmp_path, {1: states[1]})
    store = {"driver": "ocdbt", "base": f"file://{tmp_path}/1/parameters/", "path": "head/"}

    def open_head():
        tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()

    with pytest.raises(ValueError, match="Too many open files") as error, no_more_files():
        open_head()
    assert not is_damage(error.value)
    lose_arrays(tmp_path)
    with pytest.raises(ValueError, match="does not exist") as error:
        open_head()
    assert is_damage(error.value)
    assert not is_damage(OSError(errno.ESTALE, os.strerror(errno.ESTALE)))
    assert is_transient_storage_error(OSError(errno.ESTALE, os.strerror(errno.ESTALE)))


def test_where_all_are_damaged_no_run_begins_anew(trainer, states, tmp_path):
    save_all(tmp_path, {step: states[step] for step in (1, 2)})
    empty_description(tmp_path / "1")
    lose_arrays(tmp_path / "2")
    with (
        open_folder(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match=r"none of the checkpoints .* can be read.*--workdir"),
    ):
        checkpoints.restore(trainer.abstract_state())
    assert steps_in(tmp_path) == ["1", "2"]


def test_one_that_was_never_finished_does_not_count(trainer, states, tmp_path):
    save_all(tmp_path, {1: states[1]})
    (tmp_path / "1").rename(tmp_path / "2.orbax-checkpoint-tmp")
    save_all(tmp_path, {1: states[1]})
    with open_folder(tmp_path) as checkpoints, warnings.catch_warnings():
        assert int(checkpoints.restore(trainer.abstract_state()).step) == 1


@pytest.mark.parametrize(
    ("description", "config", "named"),
    [
        ({"data": {"seed": 1, "embedding": {}}}, CONFIG, ["config.seed was 0 and is 1", "senses"]),
        (
            DESCRIPTION,
            ModelConfig(**vars(CONFIG) | {"hidden_size": 16}),
            ["config.model.sizes.hidden_size was 8 and is 16"],
        ),
    ],
)
def test_one_of_another_run_is_refused_and_stays(
    trainer, states, tmp_path, description, config, named
):
    save_all(tmp_path, {1: states[1]})
    with (
        open_folder(tmp_path, description, config) as checkpoints,
        pytest.raises(CheckpointError) as error,
    ):
        checkpoints.restore(trainer.abstract_state())
    for words in [*named, "--workdir"]:
        assert words in str(error.value)
    assert (tmp_path / "1").is_dir()


def test_differences_in_words():
    theirs, ours = {"a": {"b": 1, "c": [2]}, "d": 5}, {"a": {"b": 1, "c": [3]}, "e": 4}
    assert describe_differences(theirs, ours) == [
        "a.c was [2] and is [3]",
        "d was 5 and is None",
        "e was None and is 4",
    ]
    assert not describe_differences(ours, json.loads(json.dumps(ours)))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/checkpoints cannot be written to"):
        open_folder(tmp_path / "file" / "checkpoints")


@pytest.mark.slow
def test_a_full_disk_is_an_error_that_leaves_the_older_ones_whole(trainer, states, tmp_path):
    save_all(tmp_path, {1: states[1]})
    # A limit on the size of files stands for a full disk: writing ends in an error in the same way.
    script = """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        import test_checkpoints as t
        trainer = t.trainer.__wrapped__()
        try:
            with t.open_folder(FOLDER) as checkpoints:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
                checkpoints.save(2, trainer.initial_state(2))
        except t.CheckpointError as error:
            print(error)  # Orbax's threads write to the other stream, in between.
    """
    script = textwrap.dedent(script).replace("FOLDER", repr(str(tmp_path)))
    here = Path(__file__)
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": f"{here.parent}:{here.parents[2]}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"a checkpoint could not be written to {tmp_path}" in finished.stdout, finished.stderr
    assert "newest: step 1" in finished.stdout
    with open_folder(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(trainer.abstract_state()), states[1])
