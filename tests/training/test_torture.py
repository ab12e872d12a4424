"""Runs of several processes survive repeated kills without losing a step.

`make torture` kills them twenty times, pytest alone a few times.
"""

import json
import os
from pathlib import Path
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from small_run import SMALL

from grit_jax.training.checkpoint_recovery import DAMAGED
from grit_jax.training.hooks.stop_signals import INTERRUPTED, RESTART
from grit_jax.training.hooks.watchdog import EXIT_CODE as HUNG

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", "3"))
CHECKPOINT_EVERY = 2
STEPS = 4 * KILLS + 20
FIELDS = [
    *SMALL,
    f"--config.checkpoint.every_steps={CHECKPOINT_EVERY}",
    "--config.evaluation.enabled=False",
    f"--config.steps={STEPS}",
]


class Processes:
    """The processes of one start of a run, with a number of devices each."""

    def __init__(self, count, devices, arguments, compiled):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self._processes = [
            subprocess.Popen(
                [sys.executable, "train.py", *arguments],
                cwd=ROOT,
                env=os.environ
                | {
                    "JAX_COMPILATION_CACHE_DIR": str(compiled),
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PLATFORMS": "cpu",
                    "JAX_PROCESS_ID": str(number),
                    "PYTHONPATH": str(ROOT),
                    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number in range(count)
        ]

    def is_running(self):
        return all(process.poll() is None for process in self._processes)

    def kill(self):
        """Sends SIGKILL to all processes, as if the slice were preempted."""
        for process in self._processes:
            process.kill()
        return self.wait()

    def interrupt(self, number):
        self._processes[number].send_signal(signal.SIGINT)

    def stop(self, number):
        """Suspends a process."""
        self._processes[number].send_signal(signal.SIGSTOP)

    def end_of(self, number):
        """Waits for the end of a process; returns its exit code and output."""
        output = self._processes[number].communicate(timeout=300)[0]
        return self._processes[number].returncode, output

    def wait(self):
        """Waits for the end of all processes; returns their exit codes and outputs."""
        outputs = [process.communicate(timeout=900)[0] for process in self._processes]
        return [process.returncode for process in self._processes], outputs


def read_losses(workdir):
    """Returns the loss of each step; the last line may be incomplete."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    lines = [json.loads(line) for line in lines if line.endswith("\n")]
    pairs = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def unfinished_checkpoints(workdir):
    folders = workdir.glob("checkpoints/*")
    return [folder for folder in folders if not (folder.name.isdigit() or folder.name == DAMAGED)]


def wait_until(processes, condition):
    while not condition():
        if not processes.is_running():
            codes, outputs = processes.wait()
            raise AssertionError(f"ended early with {codes}:\n{outputs[0][-3000:]}")
        time.sleep(0.002)


def die_at_some_moment(processes, workdir, moment, dice):
    """Kills the processes at a random moment; returns whether a checkpoint was being saved."""
    before = max(read_losses(workdir), default=0)
    saved = before - before % CHECKPOINT_EVERY
    if moment == "starting":
        time.sleep(dice.uniform(0.5, 6))
    elif moment == "between steps":
        wait_until(processes, lambda: max(read_losses(workdir), default=0) > saved + 1)
        time.sleep(dice.uniform(0, 1))
    else:
        # Unfinished checkpoints of the previous start are removed before the first step.
        wait_until(processes, lambda: (workdir / f"checkpoints/{saved}").exists() or not saved)
        wait_until(processes, lambda: max(read_losses(workdir), default=0) > saved)
        wait_until(processes, lambda: unfinished_checkpoints(workdir))
        time.sleep(dice.uniform(0, 0.02))
    processes.kill()
    return bool(unfinished_checkpoints(workdir))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def start(prepared_sample, compiled):
    def start(workdir, count=2, devices=2, *arguments):
        folders = [f"--config.data.folder={prepared_sample}", f"--workdir={workdir}"]
        return Processes(count, devices, [*FIELDS, *folders, *arguments], compiled)

    return start


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """The losses of an uninterrupted run of two processes with two devices each."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    codes, outputs = start(workdir).wait()
    assert codes == [0, 0], outputs
    assert f"step {STEPS}/{STEPS}" in outputs[0]
    assert "step" not in outputs[1]  # Only the primary process prints.
    losses = read_losses(workdir)
    assert sorted(losses) == list(range(1, STEPS + 1))
    return losses


@pytest.mark.slow
def test_a_run_killed_at_random_moments_has_the_losses_of_an_undisturbed_one(
    undisturbed, start, tmp_path
):
    # Ctrl-C in one process: all save together, and the other exits with the code for a restart.
    processes = start(tmp_path)
    wait_until(processes, lambda: read_losses(tmp_path))
    processes.interrupt(1)
    codes, outputs = processes.wait()
    assert codes == [RESTART, INTERRUPTED], outputs
    last = max(read_losses(tmp_path))
    assert (tmp_path / "checkpoints" / str(last)).is_dir()
    assert f"saved after step {last}; the same command continues" in outputs[0]

    dice = random.Random(0)
    moments = ["between steps", "saving", "starting"]
    were_saving = 0
    for kill in range(KILLS):
        were_saving += die_at_some_moment(start(tmp_path), tmp_path, moments[kill % 3], dice)
    while not were_saving:  # The checkpoint may be complete before the signal arrives.
        were_saving += die_at_some_moment(start(tmp_path), tmp_path, "saving", dice)

    # The newest checkpoint is damaged: all processes restore the previous one.
    saved = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    shutil.rmtree(tmp_path / "checkpoints" / str(saved[-1]) / "optimizer_state" / "d")
    codes, outputs = start(tmp_path).wait()
    if codes != [0, 0]:  # One process exited while the others were reading: restart.
        assert any("is damaged" in output for output in outputs), outputs
        assert RESTART in codes, outputs
        codes, outputs = start(tmp_path).wait()
    assert codes == [0, 0], outputs
    assert f"continuing from step {saved[-2]} " in outputs[0]
    assert (tmp_path / "checkpoints" / DAMAGED / str(saved[-1])).is_dir()
    assert read_losses(tmp_path) == undisturbed  # Bit for bit.
    assert not unfinished_checkpoints(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("undisturbed")  # Otherwise compiling would use up the timeout.
def test_a_process_that_is_stuck_does_not_keep_the_others_waiting(start, tmp_path):
    processes = start(tmp_path, 2, 2, "--config.watchdog_timeout_seconds=20")
    wait_until(processes, lambda: read_losses(tmp_path))
    processes.stop(1)
    code, output = processes.end_of(0)
    processes.kill()
    assert code == HUNG, output
    assert f"process 0 on {socket.gethostname()}: no step for 20 s after step" in output
    assert "Thread" in output and "training/loop.py" in output


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_devices(undisturbed, start, tmp_path):
    layouts = [(2, 2, []), (1, 4, ["--config.mesh.tensor=2"]), (4, 1, []), (1, 2, [])]
    dice = random.Random(1)
    for kill in range(max(3, KILLS // 2)):
        count, devices, arguments = layouts[kill % len(layouts)]
        processes = start(tmp_path, count, devices, *arguments)
        die_at_some_moment(processes, tmp_path, "between steps", dice)
    count, devices, arguments = layouts[-1]
    codes, outputs = start(tmp_path, count, devices, *arguments).wait()
    assert codes == [0] * count, outputs
    losses = read_losses(tmp_path)
    assert losses.keys() == undisturbed.keys()
    np.testing.assert_allclose(
        [losses[step] for step in sorted(losses)],
        [undisturbed[step] for step in sorted(losses)],
        rtol=1e-4,
    )
