"""An Orbax handler for plain files in a checkpoint, such as those of a tokenizer."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import future


class FilesHandler(ocp.AsyncCheckpointHandler):
    """Saves files as an item of a checkpoint, in the background, from the primary process."""

    async def async_save(self, directory: epath.Path, args: "Files") -> list[future.Future]:
        """Starts to write the files."""
        write = self._write(directory, args.files)
        return [future.CommitFutureAwaitingContractedSignals(write, name="files")]

    async def _write(self, directory: epath.Path, files: Mapping[str, bytes]) -> None:
        if jax.process_index() == 0:
            for name, content in files.items():
                (directory / name).write_bytes(content)

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Is not supported: checkpoints are saved with `async_save`."""
        raise NotImplementedError

    def restore(self, directory: epath.Path, args: "Files | None" = None) -> dict[str, bytes]:
        """Returns the names and contents of the files."""
        del args
        return {path.name: path.read_bytes() for path in directory.iterdir()}


@ocp.args.register_with_handler(FilesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class Files(ocp.args.CheckpointArgs):
    """Arguments of `FilesHandler`: names and contents of the files."""

    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
