"""Runs in a bucket: real processes with a fake Google Cloud Storage server."""

import json
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import time

import pytest
from small_run import SMALL
from storage_server import StorageServer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grit_jax.training.checkpoint_recovery import DAMAGED
from grit_jax.training.hooks.stop_signals import RESTART

ROOT = Path(__file__).parents[2]
COMMITTED = "commit_success.txt"
# The end of it says whether TensorFlow was loaded.
TRAIN = """
import sys
from grit_jax.cli import train
train(sys.argv[1:])
assert "gcsfs" in sys.modules and "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def server(prepared_sample):
    with StorageServer() as server:
        server.put_folder(prepared_sample, "data")
        yield server


@pytest.fixture(scope="module")
def fields(prepared_sample):
    return [
        *SMALL,
        f"--config.data.folder={prepared_sample}",
        "--config.steps=12",
        "--config.checkpoint.every_steps=2",
        "--config.checkpoint.keep_every_steps=6",
        "--config.evaluation.enabled=False",
        "--config.mode=generative",  # It compiles in less time.
    ]


def start(server, *arguments, count=1):
    """Starts `count` processes of a run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, *arguments],
            cwd=ROOT,
            env=os.environ
            | server.environment
            | {
                "JAX_COMPILATION_CACHE_DIR": "",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(number),
                "PYTHONPATH": str(ROOT),
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // count}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(count)
    ]


def finish(processes, code=0):
    """Waits for the end; returns what the first process has printed."""
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), outputs
    return outputs[0]


def wait_until(processes, condition):
    while not condition():
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.01)


def losses(server, run):
    lines = [json.loads(line) for line in server.read(f"{run}/metrics.jsonl").splitlines()]
    pairs = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def checkpoints(server, run):
    """The steps of complete checkpoints, and those of incomplete ones."""
    names = server.names(f"{run}/checkpoints/")
    whole = {
        int(name.split("/")[0]) for name in names if name.count("/") == 1 and COMMITTED in name
    }
    return whole, {int(name.split("/")[0]) for name in names if name[0].isdigit()} - whole


def kill_while_saving(server, run, process):
    """Kills a process that has begun a checkpoint, well before its end; returns whether it has."""
    with server.lock:  # Nothing is stored meanwhile.
        unfinished = checkpoints(server, run)[1]
        is_early = not any(
            COMMITTED in name
            for step in unfinished
            for name in server.names(f"{run}/checkpoints/{step}/")
        )
        if unfinished and is_early:
            process.send_signal(signal.SIGKILL)
            return True
    return False


def share_compiled(server, run):
    """Copies the compiled programs of the uninterrupted run to another run."""
    for name in server.names("whole/compiled/"):
        server.objects[f"{run}/compiled/{name}"] = server.objects[f"whole/compiled/{name}"]


@pytest.fixture(scope="module")
def undisturbed(server, fields):
    output = finish(start(server, *fields, "--workdir=gs://bucket/whole"))
    assert "gs://bucket/whole/curves.png" in output
    assert losses(server, "whole").keys() == set(range(1, 13))
    return losses(server, "whole")


@pytest.mark.slow
def test_a_run_in_a_bucket_leaves_all_that_one_on_a_disk_does(server, undisturbed, tmp_path):
    names = server.names("whole/")
    assert {"config.json", "metrics.jsonl", "curves.png"} <= names
    assert server.read("whole/curves.png").startswith(b"\x89PNG")
    assert json.loads(server.read("whole/config.json"))["steps"] == 12
    assert any(name.startswith("compiled/jit__step") for name in names)
    assert checkpoints(server, "whole") == ({6, 10, 12}, set())
    (events,) = (name for name in names if name.startswith("tensorboard/"))
    (tmp_path / Path(events).name).write_bytes(server.read(f"whole/{events}"))
    shown = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert {event.step: event.value for event in shown} == pytest.approx(undisturbed)


@pytest.mark.slow
def test_a_run_in_a_bucket_that_is_killed_has_the_losses_of_an_undisturbed_one(
    server, undisturbed, fields
):
    share_compiled(server, "stopped")
    common = [*fields, "--workdir=gs://bucket/stopped"]

    # Killed while a checkpoint is written: its objects are there, and what says it is whole not.
    processes = start(server, *common)
    wait_until(processes, lambda: max(checkpoints(server, "stopped")[0], default=0) >= 2)
    wait_until(processes, lambda: kill_while_saving(server, "stopped", processes[0]))
    finish(processes, -signal.SIGKILL)
    whole, cut_off = checkpoints(server, "stopped")
    assert max(cut_off) > max(whole)
    assert losses(server, "stopped").keys() >= set(range(1, max(whole) + 1))

    # Two processes that share the bucket alone go on, and save when one of them gets SIGTERM.
    # Their data is there, too.
    server.failures = 2
    processes = start(server, *common, "--config.data.folder=gs://bucket/data", count=2)
    wait_until(processes, lambda: max(checkpoints(server, "stopped")[0]) > max(whole))
    processes[1].terminate()
    output = finish(processes, RESTART)
    assert f"continuing from step {max(whole)} of gs://bucket/stopped/checkpoints" in output
    whole, cut_off = checkpoints(server, "stopped")
    assert f"saved after step {max(whole)}; the same command continues" in output
    assert not cut_off

    # The newest is damaged: the one before is taken.
    newest = f"stopped/checkpoints/{max(whole)}"
    for name in server.names(f"{newest}/parameters/d/"):
        del server.objects[f"{newest}/parameters/d/{name}"]
    output = finish(start(server, *common))
    assert f"continuing from step {sorted(whole)[-2]} of" in output
    assert f"{DAMAGED}/{max(whole)}" in output
    assert COMMITTED in server.names(f"stopped/checkpoints/{DAMAGED}/{max(whole)}/")
    assert checkpoints(server, "stopped") == ({6, 10, 12}, set())
    assert losses(server, "stopped") == pytest.approx(undisturbed, rel=1e-4)


MODELS = """
import sys
import numpy as np
from grit_jax import GritLM
from grit_jax.cli import main
from grit_jax.conversion import ConversionError, open_model
exported, converted = sys.argv[1:]
main(["convert", "to-hf", "gs://bucket/whole", exported])
main(["convert", "from-hf", exported, converted])
tokens = np.arange(8)[None]
run, model = (
    GritLM.from_pretrained(path, dtype="float32").model for path in ("gs://bucket/whole", exported)
)
np.testing.assert_array_equal(run(tokens), model(tokens))
try:
    GritLM.from_pretrained("gs://bucket/whole/checkpoints/99")
except ConversionError as error:
    print(error)
try:
    open_model("gs://bucket/whole").weights_fingerprint()
except ConversionError as error:
    print(error)
assert "tensorflow" not in sys.modules
"""


@pytest.mark.slow
def test_models_in_a_bucket_are_read_and_trained_on(server, undisturbed, fields, tmp_path):
    # A checkpoint that was cut off is not taken for the newest.
    name = "whole/checkpoints/12/parameters/_METADATA"
    server.objects[name.replace("12", "99")] = server.objects[name]
    exported, converted = tmp_path / "exported", tmp_path / "converted"
    finished = subprocess.run(
        [sys.executable, "-c", MODELS, exported, converted],
        env=os.environ | server.environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert f"checkpoints/99 has no {COMMITTED}: it was only partly saved" in finished.stdout
    assert "checkpoints/12 is not on a disk, where its weights" in finished.stdout

    # A copy of a converted model serves as well as one that Orbax has written there.
    server.put_folder(converted, "copied")
    server.put_folder(exported, "exported")
    share_compiled(server, "second")
    arguments = [*fields, "--workdir=gs://bucket/second", "--config.steps=1"]
    output = finish(start(server, *arguments, "--config.model.weights=gs://bucket/copied"))
    assert "starting from gs://bucket/copied" in output
    arguments = [*arguments, "--config.model.weights=gs://bucket/exported"]
    assert "gs://bucket/exported is not on a disk: copy it" in finish(start(server, *arguments), 2)
