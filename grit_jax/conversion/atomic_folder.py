"""The folder that a conversion writes: it appears when it is complete, or not at all."""

from collections.abc import Iterator
import contextlib
from pathlib import Path
import shutil
import tempfile

from safetensors import SafetensorError

from grit_jax.conversion.stored_model import ConversionError


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary path to write a folder to; it is renamed to `folder` at the end.

    If an error is raised in the `with` block, everything written is removed.

    Raises:
      ConversionError: `folder` exists or cannot be created, the disk is full, or the source is
        damaged. A FileNotFoundError is raised as it is.
    """
    try:
        if folder.exists():
            raise ConversionError(
                f"{folder} exists already; choose another destination or remove it"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        # On the disk of `folder`, so that it can be renamed. Orbax writes temporary folders next to
        # its destination: they are removed together with this one.
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            unfinished = Path(temporary).absolute() / folder.name
            yield unfinished
            unfinished.rename(folder)
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{folder} could not be written: {error}") from None


def check_space(folder: Path, num_bytes: int) -> None:
    """Checks that the disk of `folder` has `num_bytes` free.

    Raises:
      ConversionError: the disk has less.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ConversionError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, but the weights take "
            f"{num_bytes / 1e9:.1f} GB"
        )
