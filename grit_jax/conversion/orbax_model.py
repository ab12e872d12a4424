"""Models in Orbax checkpoints, read and written one slice at a time.

A checkpoint of a model is a folder with the items `parameters` (a tree of arrays) and
`model_config` (the content of Hugging Face's config.json). A training checkpoint also has an
`optimizer_state`.
"""

import asyncio
from collections.abc import Callable, Iterator
import functools
import itertools
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
from jaxtyping import Shaped
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from grit_jax.bucket import in_bucket
from grit_jax.conversion.atomic_folder import atomic_folder, check_space
from grit_jax.conversion.layout import Index, ParamSpec, parameters
from grit_jax.conversion.stored_model import ConversionError, Folder, StoredModel, hash_weights
from grit_jax.models import config_from_hugging_face
from grit_jax.text.tokenizer_files import read_tokenizer_files, with_saved_settings

PARAMETERS, MODEL_CONFIG, TOKENIZER = "parameters", "model_config", "tokenizer"
# Only the checkpoints of runs have this item.
DESCRIPTION = "description"
# In a bucket, Orbax marks a complete checkpoint and each of its complete items with this file.
COMMIT_FILE = "commit_success.txt"
# Slices that are read or written at the same time. It bounds the memory of a conversion.
MAX_CONCURRENT_SLICES = 2


class OrbaxModel(StoredModel):
    """A model in an Orbax checkpoint.

    Args:
      folder: the checkpoint.

    Raises:
      ConversionError: `folder` is not a checkpoint of a model.
    """

    def __init__(self, folder: Folder):
        self.folder = folder
        self.fields = read_item(folder, MODEL_CONFIG)
        self.config = config_from_hugging_face(self.fields)
        self.parameters = parameters(self.config)

    @functools.cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """Names and contents of the tokenizer's files; empty if the checkpoint has none."""
        files = read_tokenizer_files(self.folder / TOKENIZER)
        is_of_run = (self.folder / DESCRIPTION).exists()
        return with_saved_settings(files) if is_of_run else files

    def dtype(self, parameter: ParamSpec) -> np.dtype:
        """Returns the type that the parameter is stored in."""
        return self._store(parameter.path).dtype.numpy_dtype

    def read(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a slice of a parameter, see `StoredModel.read`."""
        store = self._store(parameter.path)[index]
        if store.spec().to_json()["metadata"]["order"] == "F":
            return store.T.read().result().T  # Read in the order of the disk, without transposing.
        return store.read().result()

    @functools.cache  # noqa: B019  one model is open at a time
    def read_whole(self, path: tuple[str, ...]) -> Shaped[np.ndarray, "..."]:
        """Returns an array of the checkpoint and caches it; meant for small arrays."""
        return self._store(path).read().result()

    def _load(self, shapes: dict[str, Any]) -> dict[str, Any]:
        by_path = flatten_dict(shapes)
        shapes = unflatten_dict({p.path: by_path[p.path] for p in self.parameters})
        arguments = ocp.args.Composite(parameters=ocp.args.StandardRestore(shapes))
        return _checkpointer().restore(_absolute(self.folder), arguments)[PARAMETERS]

    def weights_fingerprint(self) -> str:
        """Returns a hash of the weights, see `StoredModel.weights_fingerprint`."""
        if not isinstance(self.folder, Path):
            raise ConversionError(
                f"{self.folder} is not on a disk, where its weights can be hashed: copy it to one "
                "(gcloud storage cp -r)"
            )
        files = (path for path in (self.folder / PARAMETERS).rglob("*") if path.is_file())
        return hash_weights("orbax", files)

    @functools.cache  # noqa: B019  one model is open at a time
    def _store(self, path: tuple[str, ...]) -> tensorstore.TensorStore:
        folder = _absolute(self.folder)
        base = f"{folder if in_bucket(folder) else f'file://{folder}'}/{PARAMETERS}/"
        kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(path) + "/"}
        try:
            return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, read=True).result()
        except ValueError as error:
            raise ConversionError(
                f"{self.folder} has no parameter {'.'.join(path)}: {error}"
            ) from None


def _absolute(folder: Folder) -> Folder:
    return folder if in_bucket(folder) else folder.absolute()


def read_item(folder: Folder, name: str) -> dict[str, Any]:
    """Returns a JSON item of a checkpoint.

    Raises:
      ConversionError: the checkpoint has no such item.
    """
    try:
        arguments = ocp.args.Composite(**{name: ocp.args.JsonRestore()})
        return _checkpointer().restore(_absolute(folder), arguments)[name]
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ConversionError(f"{folder} is not a checkpoint of a model: {error}") from None


def write_orbax(model: StoredModel, folder: Path) -> None:
    """Writes a model as an Orbax checkpoint, layer by layer.

    The checkpoint also gets the tokenizer's files, in `tokenizer`. If writing fails, nothing is
    left behind.

    Raises:
      ConversionError: the folder exists, or the disk is full.
      FileNotFoundError, TokenizerError: the model's tokenizer is missing or damaged.
    """
    tokenizer_files = model.tokenizer_files  # Fails early if the tokenizer cannot be read.
    tree = unflatten_dict({p.path: _LazyArray(model, p) for p in model.parameters})
    writer = _SliceWriter()
    handlers = ocp.type_handlers.create_type_handler_registry(
        (_LazyArray, writer), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    # Compressing weights takes minutes and saves only a tenth of the space.
    to_arrays = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)
    checkpointer = _checkpointer(parameters=to_arrays, model_config=ocp.JsonCheckpointHandler())
    items = ocp.args.Composite(
        parameters=ocp.args.PyTreeSave(tree), model_config=ocp.args.JsonSave(model.fields)
    )
    with atomic_folder(folder) as unfinished:
        check_space(unfinished.parent, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
        try:
            checkpointer.save(unfinished, items)
        except ValueError:  # Orbax cannot finish a checkpoint whose arrays were not written.
            if writer.error is None:
                raise
        if writer.error is not None:
            raise writer.error
        (unfinished / TOKENIZER).mkdir()
        for name, content in tokenizer_files.items():
            (unfinished / TOKENIZER / name).write_bytes(content)
        for item in (PARAMETERS, MODEL_CONFIG, "."):  # So that it can be copied to a bucket.
            (unfinished / item / COMMIT_FILE).touch()


def _checkpointer(**handlers: Any) -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


class _LazyArray:
    """A parameter that is read while it is written. Orbax uses its shape and type."""

    def __init__(self, model: StoredModel, parameter: ParamSpec):
        self.shape = parameter.full_shape
        self.dtype = model.dtype(parameter)
        self.ndim = len(self.shape)
        self.size = int(np.prod(self.shape))
        self.nbytes = self.size * self.dtype.itemsize
        # Matrices of linear layers keep the order of Hugging Face's [out, in] tensors on the disk.
        self.order = "F" if parameter.num_inputs and len(parameter.shape) == 2 else "C"
        self.chunk = (1,) * len(parameter.stack_shape) + parameter.shape
        self._stack_shape = parameter.stack_shape
        self._read = functools.partial(model.read, parameter)

    def slices(self) -> Iterator[tuple[Index, Callable[[], np.ndarray]]]:
        """Yields the index of each chunk, and a function that reads it."""
        for stack_index in itertools.product(*map(range, self._stack_shape)):
            index = tuple(slice(i, i + 1) for i in stack_index)
            index += tuple(slice(0, size) for size in self.chunk[len(stack_index) :])
            yield index, functools.partial(self._read, index)


class _SliceWriter(ocp.type_handlers.NumpyHandler):
    """Writes each `_LazyArray` to the array that Orbax opens for it, chunk by chunk.

    Attributes:
      error: the first error. It is not raised at once, because Orbax would let the other writes go
        on in a folder that is being removed.
    """

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self.error: OSError | None = None
        self._semaphore = asyncio.Semaphore(MAX_CONCURRENT_SLICES)

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: Any) -> None:
        tspec["metadata"] |= {"chunks": value.chunk, "order": value.order}
        store = await tensorstore.open(
            tensorstore.Spec(tspec), create=True, open=True, context=ts_context
        )
        for index, read in value.slices():
            async with self._semaphore:
                if self.error is None:
                    await self._write(store, index, read)

    async def _write(self, store: Any, index: Index, read: Callable[[], np.ndarray]) -> None:
        array = await asyncio.to_thread(read)
        try:
            await store[index].write(array)
        except ValueError as error:  # tensorstore turns the system's errors into ValueErrors.
            self.error = OSError(str(error))
