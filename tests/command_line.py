"""Runs `grit-jax` commands in a new process or, faster, in this process."""

import contextlib
import io
import os
from pathlib import Path
import subprocess
import sys

from grit_jax.cli import main

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "grit_jax"]
MAIN = "from grit_jax.cli import main; main()"  # The same command in a script, after other code.


def environment():
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path}


def run_python(script, *arguments, cwd):
    return _run([sys.executable, "-c", script, *arguments], cwd)


def grit_jax(*arguments, cwd):
    return _run([*COMMAND, *arguments], cwd)


def grit_jax_in_process(*arguments, cwd):
    """Runs a command in this process, for tests of its results and messages."""
    returncode, stdout, stderr = 0, io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            returncode = end.code
    return subprocess.CompletedProcess(arguments, returncode, stdout.getvalue(), stderr.getvalue())


def _run(command, cwd):
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def with_full_disk(script, num_bytes):
    """Returns a script that cannot write files larger than `num_bytes`, as on a full disk."""
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({num_bytes}, {num_bytes}))"
    return f"import resource; {limit}; {script}"


def assert_fails_in_one_line(finished, *named):
    """Checks that the last line of standard error has all of `named`.

    TensorFlow may print lines before it.
    """
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    message = finished.stderr.splitlines()[-1]
    for name in named:
        assert name in message
