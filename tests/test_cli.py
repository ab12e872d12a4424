"""The command `grit-jax` without a subcommand, and help that needs no JAX."""

from importlib.metadata import version

from command_line import ROOT, run_python

SCRIPT = """
import sys
from grit_jax.cli import main
main(["--version"])
main(["--help"])
main(["train", "--config=nowhere.py", "--help"])
assert "jax" not in sys.modules
"""


def test_help_and_version_are_printed_without_loading_jax():
    finished = run_python(SCRIPT, cwd=ROOT)
    assert finished.returncode == 0 and not finished.stderr, finished.stderr
    assert finished.stdout.startswith(f"grit-jax {version('grit-jax')}\n")
    assert "\n  evaluate " in finished.stdout
    assert "\n  --config.optimizer.learning_rate=2e-05\n" in finished.stdout
    assert "\n  --config.model.sizes.hidden_size=4096\n" in finished.stdout
