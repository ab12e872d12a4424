"""Processes with different settings fail with an error that names the setting and the process."""

import os
from pathlib import Path
import shutil
import socket
import subprocess
import sys

from command_line import ROOT
import pytest

SCRIPT = """
import json, sys
from etils import epath
from grit_jax.consistency import check_agreement, check_shared
from grit_jax.processes import ProcessError, connect
connect()
try:
    check_agreement(json.loads(sys.argv[1]))
    for folder in sys.argv[2:]:
        check_shared(epath.Path(folder))
    print("agreed")
except ProcessError as error:
    print(error)
"""
FACTS = ['{"config.seed": 0, "config.steps": 10}'] * 3


def run_processes(facts, devices=(1, 1, 1), sources=(ROOT, ROOT, ROOT), folders=((), (), ())):
    """Returns what each of three processes prints."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, facts[number], *folders[number]],
            env=os.environ
            | {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "3",
                "JAX_PLATFORMS": "cpu",
                "JAX_PROCESS_ID": str(number),
                "PYTHONPATH": str(sources[number]),
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices[number]}",
            },
            cwd=sources[number],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    return [process.communicate(timeout=300)[0].splitlines()[-1] for process in processes]


@pytest.mark.slow
def test_processes_that_are_alike_agree(tmp_path):
    assert run_processes(FACTS, folders=[[tmp_path]] * 3) == ["agreed"] * 3
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_process_whose_folder_is_another_is_named(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    messages = run_processes(FACTS, folders=[[tmp_path], [tmp_path], [own]])
    for message, folder in zip(messages, [tmp_path, tmp_path, own], strict=True):
        assert f"process 2 on {socket.gethostname()} has another folder {folder}" in message


@pytest.mark.slow
def test_a_process_with_another_configuration_is_named_by_all():
    facts = [*FACTS[:2], '{"config.seed": 1, "config.steps": 10}']
    (message,) = set(run_processes(facts))
    host = socket.gethostname()
    assert f"process 2 on {host} differs from the other processes in config.seed:" in message


@pytest.mark.slow
def test_a_process_with_other_devices_is_named():
    (message,) = set(run_processes(FACTS, devices=(1, 2, 1)))
    assert "process 1 has 2 devices, the others 1 each" in message


@pytest.mark.slow
def test_a_process_with_other_code_is_named(tmp_path):
    shutil.copytree(ROOT / "grit_jax", tmp_path / "grit_jax", ignore=shutil.ignore_patterns("*.gz"))
    with Path(tmp_path / "grit_jax" / "models" / "layers.py").open("a") as file:
        file.write("# changed\n")
    (message,) = set(run_processes(FACTS, sources=(ROOT, tmp_path, ROOT)))
    assert "process 1 on " in message and "in the code of grit-jax: start" in message
