"""An item of a checkpoint that is plain files, such as those of a tokenizer."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import future


class FilesHandler(ocp.AsyncCheckpointHandler):
    """Writes files into the folder of an item, with the rest of a checkpoint; one process does."""

    async def async_save(self, directory: epath.Path, args: "Files") -> list[future.Future]:
        """Begins to write the files."""
        write = self._write(directory, args.files)
        return [future.CommitFutureAwaitingContractedSignals(write, name="files")]

    async def _write(self, directory: epath.Path, files: Mapping[str, bytes]) -> None:
        if jax.process_index() == 0:
            for name, content in files.items():
                (directory / name).write_bytes(content)

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Is not used: checkpoints are saved in the background."""
        raise NotImplementedError

    def restore(self, directory: epath.Path, args: "Files | None" = None) -> dict[str, bytes]:
        """Returns names and contents of the files."""
        del args
        return {path.name: path.read_bytes() for path in directory.iterdir()}


@ocp.args.register_with_handler(FilesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class Files(ocp.args.CheckpointArgs):
    """Names and contents of the files."""

    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
