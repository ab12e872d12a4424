"""The two sides of `benchmarks/train_step.py` do the same work."""

import subprocess
import sys

from command_line import ROOT, environment
import pytest

SCRIPT = ROOT / "benchmarks" / "train_step.py"


@pytest.mark.slow
def test_steps_of_both_sides_have_the_same_losses_and_parameters():
    finished = subprocess.run(
        [sys.executable, SCRIPT, "--check"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.endswith("both sides agree\n")
