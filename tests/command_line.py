"""The command line as a user types it, in a process of its own."""

import os
from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-c", "from grit_jax.cli import main; main()"]


def environment():
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path}


def run_python(script, *arguments, cwd):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def grit_jax(*arguments, cwd):
    return run_python(COMMAND[-1], *arguments, cwd=cwd)


def assert_fails_in_one_line(finished, *named):
    """What a user sees last is one line that names the cause; TensorFlow's own come before it."""
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    message = finished.stderr.splitlines()[-1]
    for name in named:
        assert name in message
