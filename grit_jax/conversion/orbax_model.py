"""A model in an Orbax checkpoint: written and read part by part, whatever its size.

A checkpoint of a model is a folder with the items `parameters` (a tree of arrays) and
`model_config` (the content of Hugging Face's config.json). A checkpoint of training is one with an
`optimizer_state` beside them.
"""

import asyncio
from collections.abc import Callable, Iterator
import functools
import itertools
from pathlib import Path
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
from jaxtyping import Shaped
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from grit_jax.bucket import in_bucket
from grit_jax.conversion.atomic_folder import atomic_folder, check_space
from grit_jax.conversion.fingerprint import fingerprint
from grit_jax.conversion.gguf_model import GgufModel
from grit_jax.conversion.hugging_face import HuggingFaceModel
from grit_jax.conversion.layout import Index, ParamSpec, parameters
from grit_jax.conversion.safetensors_folder import ConversionError
from grit_jax.conversion.sidecar_files import copy_tokenizer
from grit_jax.models import ModelConfig, config_from_hugging_face

PARAMETERS, MODEL_CONFIG, TOKENIZER = "parameters", "model_config", "tokenizer"
# What Orbax looks for in a checkpoint in a bucket, and in each of its items, to see if it is whole.
COMMITTED = "commit_success.txt"
Folder = Path | epath.Path
# Parts that are read or written at the same time: memory is that of so many tensors.
PARTS_AT_ONCE = 2


class OrbaxModel:
    """The weights of a model in an Orbax checkpoint.

    Args:
      folder: the checkpoint.

    Raises:
      ConversionError: it is no checkpoint of a model.
    """

    def __init__(self, folder: Folder):
        self.folder = folder
        self.tokenizer_folder = folder / TOKENIZER
        self.fields: dict[str, Any] = read_item(folder, MODEL_CONFIG)
        self.config: ModelConfig = config_from_hugging_face(self.fields)
        self.parameters = parameters(self.config)

    def dtype(self, parameter: ParamSpec) -> np.dtype:
        """Returns the type that the parameter is stored in."""
        return self._store(parameter.path).dtype.numpy_dtype

    def read(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a part of a parameter, in the type it is stored in."""
        store = self._store(parameter.path)[index]
        if store.spec().to_json()["metadata"]["order"] == "F":
            return store.T.read().result().T  # As it lies on the disk: nothing is transposed.
        return store.read().result()

    def load(self, shapes: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters as global arrays, laid out as `shapes` says.

        Args:
          shapes: nested dictionaries with a `jax.ShapeDtypeStruct` that has a sharding for each
            parameter, as `nnx.to_pure_dict` gives of an abstract state. Those of parameters that
            this model does not have are left out.
        """
        by_path = flatten_dict(shapes)
        shapes = unflatten_dict({p.path: by_path[p.path] for p in self.parameters})
        arguments = ocp.args.Composite(parameters=ocp.args.StandardRestore(shapes))
        return _checkpointer().restore(_absolute(self.folder), arguments)[PARAMETERS]

    def fingerprint(self) -> str:
        """Returns what tells these weights from others, see `fingerprint`.

        Raises:
          ConversionError: they are in a bucket.
        """
        if not isinstance(self.folder, Path):
            raise ConversionError(
                f"{self.folder} is not on a disk, where its weights can be told from others': copy "
                "it to one (gcloud storage cp -r)"
            )
        files = (path for path in (self.folder / PARAMETERS).rglob("*") if path.is_file())
        return fingerprint("orbax", files)

    @functools.cache  # noqa: B019  one model is open at a time
    def whole(self, path: tuple[str, ...]) -> Shaped[np.ndarray, "..."]:
        """Returns an array of the checkpoint, and keeps it: for those that are small."""
        return self._store(path).read().result()

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
    """Returns an item of a checkpoint that is in JSON.

    Raises:
      ConversionError: there is none.
    """
    try:
        arguments = ocp.args.Composite(**{name: ocp.args.JsonRestore()})
        return _checkpointer().restore(_absolute(folder), arguments)[name]
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ConversionError(f"{folder} is no checkpoint of a model: {error}") from None


def write_orbax(model: HuggingFaceModel | GgufModel, folder: Path) -> None:
    """Writes the model as an Orbax checkpoint, a layer at a time; it is whole or not there.

    The tokenizer's files lie beside the items, in `tokenizer`.

    Raises:
      ConversionError: the folder exists, or the disk is full.
    """
    tokenizer_folder = model.tokenizer_folder  # What is wrong with it shows before time is spent.
    tree = unflatten_dict({p.path: _Unread(model, p) for p in model.parameters})
    writer = _PartByPart()
    handlers = ocp.type_handlers.create_type_handler_registry(
        (_Unread, writer), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    # Weights look like noise: compressing them costs minutes and saves a tenth.
    to_arrays = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)
    checkpointer = _checkpointer(parameters=to_arrays, model_config=ocp.JsonCheckpointHandler())
    items = ocp.args.Composite(
        parameters=ocp.args.PyTreeSave(tree), model_config=ocp.args.JsonSave(model.fields)
    )
    with atomic_folder(folder) as unfinished:
        check_space(unfinished.parent, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
        try:
            checkpointer.save(unfinished, items)
        except ValueError:  # What is not written cannot be finished.
            if writer.error is None:
                raise
        if writer.error is not None:
            raise writer.error
        (unfinished / TOKENIZER).mkdir()
        copy_tokenizer(tokenizer_folder, unfinished / TOKENIZER)
        for item in (PARAMETERS, MODEL_CONFIG, "."):  # For a copy in a bucket.
            (unfinished / item / COMMITTED).touch()


def _checkpointer(**handlers: Any) -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


class _Unread:
    """A parameter that is read when it is written: to Orbax an array, by its shape and type."""

    def __init__(self, model: HuggingFaceModel | GgufModel, parameter: ParamSpec):
        self.shape = parameter.full_shape
        self.dtype = model.dtype(parameter)
        self.ndim = len(self.shape)
        self.size = int(np.prod(self.shape))
        self.nbytes = self.size * self.dtype.itemsize
        self.order = "F" if parameter.num_inputs and len(parameter.shape) == 2 else "C"
        self.chunk = (1,) * len(parameter.stack_shape) + parameter.shape
        self._stack_shape = parameter.stack_shape
        self._read = functools.partial(model.read, parameter)

    def parts(self) -> Iterator[tuple[Index, Callable[[], np.ndarray]]]:
        """Yields the index of each part, and a function that reads it."""
        for place in itertools.product(*map(range, self._stack_shape)):
            index = tuple(slice(i, i + 1) for i in place)
            index += tuple(slice(0, size) for size in self.chunk[len(place) :])
            yield index, functools.partial(self._read, index)


class _PartByPart(ocp.type_handlers.NumpyHandler):
    """Writes an `_Unread` to the array that Orbax opens for it, one chunk a part.

    Attributes:
      error: the first error. It is kept, not raised: Orbax would leave the other writes running,
        into a folder that is being removed.
    """

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self.error: OSError | None = None
        self._places = asyncio.Semaphore(PARTS_AT_ONCE)

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: Any) -> None:
        # A linear layer's matrix lies on the disk as it came, its axes named the other way round.
        tspec["metadata"] |= {"chunks": value.chunk, "order": value.order}
        store = await tensorstore.open(
            tensorstore.Spec(tspec), create=True, open=True, context=ts_context
        )
        for index, read in value.parts():
            async with self._places:
                if self.error is None:
                    await self._write(store, index, read)

    async def _write(self, store: Any, index: Index, read: Callable[[], np.ndarray]) -> None:
        part = await asyncio.to_thread(read)
        try:
            await store[index].write(part)
        except ValueError as error:  # What tensorstore makes of the system's error.
            self.error = OSError(str(error))
