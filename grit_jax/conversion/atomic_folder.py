"""Where a conversion writes to: a folder that is whole or not there."""

from collections.abc import Iterator
import contextlib
from pathlib import Path
import shutil
import tempfile

from safetensors import SafetensorError

from grit_jax.conversion.safetensors_folder import ConversionError


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Gives a path to make a folder at, which takes its place when it is full.

    If filling it fails, all of it goes.

    Raises:
      ConversionError: `folder` exists or cannot be made, the disk is full, or what it is made of
        cannot be read. A FileNotFoundError of the latter comes as it is.
    """
    try:
        if folder.exists():
            raise ConversionError(
                f"{folder} exists already; choose another destination or remove it"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        # On the same disk, so that it can be renamed; in a folder of its own, with all that its
        # writers put beside it.
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside:
            unfinished = Path(aside).absolute() / folder.name
            yield unfinished
            unfinished.rename(folder)
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{folder} was not made: {error}") from None


def check_space(folder: Path, needed: int) -> None:
    """Checks that the disk of `folder` has room for so many bytes.

    Raises:
      ConversionError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConversionError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, but the weights take {needed / 1e9:.1f}"
        )
