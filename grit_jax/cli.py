"""The command `grit-jax` and its subcommands. Errors are printed in one line."""

from collections.abc import Sequence
import importlib
import os
from pathlib import Path
import signal
import sys
import traceback
from typing import Any
import warnings

from grit_jax import __version__

HELP = {"-h", "--help"}
# Flag of `train` that first prepares the data.
PREPARE = "--prepare"
USAGE_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT  # As in shells.

COMMANDS = {
    "train": "Trains a model: --config FILE [--workdir DIR] [--prepare] [--config.FIELD=VALUE ...]",
    "prepare": "Tokenizes datasets, once, for training",
    "convert": "Converts weights between Hugging Face, GGUF and Orbax: from-hf, from-gguf, to-hf",
    "push": "Uploads an export to the Hugging Face Hub",
    "plan": "Compiles a training step for TPUs without having any, and reports memory and speed",
    "rag": "Builds an index of documents, or answers questions from one",
    "evaluate": "Evaluates a model with MTEB and lm-eval, next to the paper's results",
}
# Modules whose function `run` is a subcommand. They are imported when needed.
MODULES = {
    "prepare": "grit_jax.prepare.command",
    "convert": "grit_jax.conversion.command",
    "push": "grit_jax.conversion.push",
    "plan": "grit_jax.planning.command",
    "rag": "grit_jax.rag.command",
    "evaluate": "grit_jax.evaluation.command",
}
# The extra of grit-jax that installs a package.
EXTRAS = {
    "lm_eval": "harnesses",
    "mistral_common": "prepare",
    "mteb": "harnesses",
    "pyarrow": "prepare",
    "seqio": "data",
    "tensorflow": "data",
    "tensorflow_datasets": "data",
    "zstandard": "prepare",
}
# Lists all fields of the configuration. docs/configuration_page.py writes it, because importing
# grit_jax.config takes seconds.
TRAIN_HELP = Path(__file__).with_name("train_help.txt")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `grit-jax` with the given arguments, by default those of the process."""
    _quiet_output()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in HELP:
        print(_usage())
        return
    if argv[0] == "--version":
        print(f"grit-jax {__version__}")
        return
    command, *arguments = argv
    if command not in COMMANDS:
        fail(f"grit-jax: unknown command {command!r}; the commands are {', '.join(COMMANDS)}")
    if command == "train":
        train(arguments)
        return
    try:
        importlib.import_module(MODULES[command]).run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        package, extra = error.name, EXTRAS[error.name]
        fail(f"grit-jax {command} needs the package {package}: pip install 'grit-jax[{extra}]'")
    except Exception as error:
        if not (_is_own(error) or isinstance(error, OSError)):
            raise
        fail(f"{type(error).__name__}: {error}")


def _usage() -> str:
    lines = [f"  {name:10}{description}" for name, description in COMMANDS.items()]
    head = f"usage: grit-jax {{{','.join(COMMANDS)}}} ..."
    foot = "grit-jax COMMAND --help describes a command; grit-jax --version prints the version."
    return "\n".join([head, "", *lines, "", foot])


def fail(message: str) -> None:
    """Prints a line to standard error and ends the process."""
    print(message, file=sys.stderr)
    raise SystemExit(USAGE_ERROR)


def _quiet_output() -> None:
    """Prints warnings in one line, and hides what TensorFlow logs about missing GPUs."""
    warnings.showwarning = _print_warning
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def _print_warning(message: Warning | str, *where: Any, **options: Any) -> None:
    """Prints a warning in one line, without the line of code that caused it."""
    del where, options
    print(f"warning: {message}", file=sys.stderr)


def _is_own(error: Exception) -> bool:
    """Returns whether grit-jax defines the type of an error, whose message is then for users."""
    return type(error).__module__.startswith("grit_jax.")


def train(argv: Sequence[str] | None = None) -> None:
    """Runs `grit-jax train` with the given arguments, by default those of the process."""
    _quiet_output()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or HELP & set(argv):
        print(TRAIN_HELP.read_text(), end="")
        return
    from etils import epath
    import jax

    from grit_jax.bucket import in_bucket, is_transient_storage_error, open_bucket
    from grit_jax.config_flags import parse_flags
    from grit_jax.config_from_data import missing_mixtures, prepare_arguments
    from grit_jax.processes import connect, exit_now, is_primary
    from grit_jax.run import run
    from grit_jax.training.checkpoints import RestartRequired
    from grit_jax.training.hooks.stop_signals import RESTART, Stopped

    try:
        is_preparing = PREPARE in argv
        config, workdir = parse_flags([argument for argument in argv if argument != PREPARE])
        connect()
        if is_preparing and jax.process_count() == 1 and missing_mixtures(config):
            importlib.import_module(MODULES["prepare"]).run(prepare_arguments(config))
        run(config, open_bucket(workdir) if in_bucket(workdir) else epath.Path(workdir).resolve())
    except Stopped as stopped:
        if is_primary():
            print(f"{stopped}; the same command continues the run", file=sys.stderr)
        raise SystemExit(stopped.exit_code) from None
    except KeyboardInterrupt:
        line = "interrupted; the same command continues from the newest checkpoint"
        print(line, file=sys.stderr, flush=True)
        # Everything is closed. A clean exit would crash if the compiler was interrupted.
        os._exit(INTERRUPTED)
    except BaseException as error:
        if not isinstance(error, Exception) or not _is_own(error):
            traceback.print_exc()
            exit_now(1)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        # Storage that worked at the start may work again after a restart.
        can_retry = isinstance(error, RestartRequired) or is_transient_storage_error(
            error.__cause__
        )
        exit_now(RESTART if can_retry else USAGE_ERROR)
