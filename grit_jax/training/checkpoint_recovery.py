"""Damaged checkpoints: told from those that cannot be read for now, and moved out of the way."""

import contextlib
import itertools
import json
import warnings

from etils import epath

from grit_jax.bucket import is_transient_storage_error, one_line

# Where checkpoints that cannot be read are moved to: nothing is deleted.
DAMAGED = "damaged"
# What Orbax and Python raise where a file is missing, cut off or garbled.
OF_FILES = (FileNotFoundError, KeyError, UnicodeDecodeError, json.JSONDecodeError)
# What tensorstore puts beside an error: what it was to open, and the number of a system's error.
OPENED, OF_SYSTEM = "tensorstore_spec", "os_error_code"


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint could not be read, and an older one is taken."""


def is_damage(error: Exception) -> bool:
    """Returns whether an error at reading a checkpoint is about what lies in its files.

    Others are about the machine (no memory, no permission, too many open files, a disk or a bucket
    that does not answer) or about the program (an optimizer whose state has another form).
    """
    if is_transient_storage_error(error):
        return False
    # An array or a tree of another shape is a ValueError as well, of other libraries.
    is_of_arrays = isinstance(error, ValueError) and OPENED in str(error)
    return isinstance(error, OF_FILES) or (is_of_arrays and OF_SYSTEM not in str(error))


def quarantine(checkpoint: epath.Path, failure: Exception) -> epath.Path:
    """Moves a checkpoint to `damaged`, with a warning, and returns where it is then."""
    destination = _free_place(checkpoint)
    message = (
        f"the checkpoint of step {checkpoint.name} cannot be read and is now {destination}: "
        f"{one_line(failure)}"
    )
    # Another process may be moving it, too.
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        destination.parent.mkdir(exist_ok=True)
        # In a bucket a folder is there when something is in it.
        destination.with_suffix(".txt").write_text(f"{message}\n")
        checkpoint.rename(destination)
    warnings.warn(message, DamagedCheckpointWarning, stacklevel=4)
    return destination


def forget_garbled_measures(checkpoints: epath.Path) -> None:
    """Removes measures that cannot be read: Orbax reads all when it opens a folder of checkpoints.

    The best is then chosen among the others.
    """
    for checkpoint in checkpoints.glob("*"):
        measures = checkpoint / "metrics" / "metrics"
        try:
            json.loads(measures.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            continue  # It has none, or another process has removed them.
        except ValueError:
            measures.unlink(missing_ok=True)


def _free_place(checkpoint: epath.Path) -> epath.Path:
    step = checkpoint.name
    names = itertools.chain([step], (f"{step}-{n}" for n in itertools.count(2)))
    places = (checkpoint.parent / DAMAGED / name for name in names)
    return next(place for place in places if not place.exists())
