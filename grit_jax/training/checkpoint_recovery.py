"""Recovery from damaged checkpoints: detects them and moves them to another folder."""

import contextlib
import itertools
import json
import warnings

from etils import epath

from grit_jax.bucket import is_transient_storage_error, one_line

# Folder that damaged checkpoints are moved to. Nothing is deleted.
DAMAGED = "damaged"
# Raised by Orbax and Python for missing, truncated or corrupted files.
FILE_ERRORS = (FileNotFoundError, KeyError, UnicodeDecodeError, json.JSONDecodeError)
# In messages of tensorstore: the array that could not be opened, and an error of the system.
ARRAY_MARK, SYSTEM_ERROR_MARK = "tensorstore_spec", "os_error_code"


class DamagedCheckpointWarning(UserWarning):
    """A damaged checkpoint was skipped, and an older one is used."""


def is_damage(error: Exception) -> bool:
    """Returns whether an error from reading a checkpoint means that its files are damaged.

    Other errors come from the machine (out of memory, permissions, too many open files, storage
    that does not respond) or from the program (an optimizer with another state).
    """
    if is_transient_storage_error(error):
        return False
    # Other libraries raise ValueError for arrays and trees of another shape.
    is_of_array = isinstance(error, ValueError) and ARRAY_MARK in str(error)
    return isinstance(error, FILE_ERRORS) or (is_of_array and SYSTEM_ERROR_MARK not in str(error))


def quarantine(checkpoint: epath.Path, failure: Exception) -> epath.Path:
    """Moves a checkpoint to the folder `damaged`, warns, and returns the new path."""
    destination = _unused_path(checkpoint)
    message = (
        f"the checkpoint of step {checkpoint.name} cannot be read and was moved to {destination}: "
        f"{one_line(failure)}"
    )
    # Other processes may be moving it at the same time.
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        destination.parent.mkdir(exist_ok=True)
        # This also creates the folder in a bucket, where empty folders do not exist.
        destination.with_suffix(".txt").write_text(f"{message}\n")
        checkpoint.rename(destination)
    warnings.warn(message, DamagedCheckpointWarning, stacklevel=4)
    return destination


def remove_unreadable_metrics(checkpoints: epath.Path) -> None:
    """Deletes metrics files that cannot be parsed; Orbax would fail to open the folder.

    The best checkpoint is then chosen among the others.
    """
    for checkpoint in checkpoints.glob("*"):
        metrics = checkpoint / "metrics" / "metrics"
        try:
            json.loads(metrics.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            continue  # No metrics, or another process has deleted them.
        except ValueError:
            metrics.unlink(missing_ok=True)


def _unused_path(checkpoint: epath.Path) -> epath.Path:
    step = checkpoint.name
    names = itertools.chain([step], (f"{step}-{n}" for n in itertools.count(2)))
    paths = (checkpoint.parent / DAMAGED / name for name in names)
    return next(path for path in paths if not path.exists())
