"""Processes with different settings fail with an error that names the setting and the process."""

import json
import os
from pathlib import Path
import shutil
import socket
import subprocess
import sys

from command_line import ROOT
import pytest

# Prints a line for each set of settings and each folder.
SCRIPT = """
import json, sys
from etils import epath
from grit_jax.consistency import check_agreement, check_shared
from grit_jax.processes import ProcessError, connect
def report(check, argument):
    try:
        check(argument)
        print("agreed")
    except ProcessError as error:
        print(error)
connect()
for settings in json.loads(sys.argv[1]):
    report(check_agreement, settings)
for folder in sys.argv[2:]:
    report(check_shared, epath.Path(folder))
"""
SETTINGS = {"config.seed": 0, "config.steps": 10}


def run_processes(
    settings=([SETTINGS],) * 3, devices=(1, 1, 1), sources=(ROOT, ROOT, ROOT), folders=((), (), ())
):
    """Returns the lines that each of three processes prints."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, json.dumps(settings[number]), *folders[number]],
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
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [
        [line for line in output.splitlines() if not line.startswith("[Gloo]")]
        for output in outputs
    ]


@pytest.mark.slow
def test_processes_with_other_settings_or_another_folder_are_named_by_all(tmp_path):
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    own.mkdir()
    outputs = run_processes(
        settings=[[SETTINGS, SETTINGS | {"config.seed": seed}] for seed in (0, 0, 1)],
        folders=[[shared, shared], [shared, shared], [shared, own]],
    )
    process = f"process 2 on {socket.gethostname()}"
    for lines, folder in zip(outputs, [shared, shared, own], strict=True):
        assert lines[0] == "agreed"
        assert f"{process} differs from the other processes in config.seed:" in lines[1]
        assert lines[2] == "agreed"
        assert f"{process} has another folder {folder}" in lines[3]
    assert not list(shared.iterdir())


@pytest.mark.slow
def test_a_process_with_other_devices_is_named():
    for (line,) in run_processes(devices=(1, 2, 1)):
        assert "process 1 has 2 devices, the others 1 each" in line


@pytest.mark.slow
def test_a_process_with_other_code_is_named(tmp_path):
    shutil.copytree(ROOT / "grit_jax", tmp_path / "grit_jax", ignore=shutil.ignore_patterns("*.gz"))
    with Path(tmp_path / "grit_jax" / "models" / "layers.py").open("a") as file:
        file.write("# changed\n")
    for (line,) in run_processes(sources=(ROOT, tmp_path, ROOT)):
        assert "process 1 on " in line and "in the code of grit-jax: start" in line
