"""Both sides of `benchmarks/inference.py` return the same results."""

import subprocess
import sys

from command_line import ROOT, environment
import pytest

SCRIPT = ROOT / "benchmarks" / "inference.py"


@pytest.mark.slow
def test_both_sides_embed_and_generate_the_same():
    cases = ["encode sample", "decode 1"]
    options = ["--preset", "tiny", "--rounds", "1", "--repeats", "1", "--cases", *cases]
    finished = subprocess.run(
        [sys.executable, SCRIPT, *options],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert all(case in finished.stdout for case in cases)
