"""The base class of models on disk, whatever format they are stored in."""

import abc
from collections.abc import Iterable, Set
import functools
import hashlib
from pathlib import Path
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
from jaxtyping import Shaped
import numpy as np

from grit_jax.conversion.layout import Index, ParamSpec
from grit_jax.models import ModelConfig
from grit_jax.text.tokenizer_files import read_tokenizer_files

Folder = Path | epath.Path

# Sampled from each file for a fingerprint, evenly spaced: every matrix of a 5 GB file is covered.
FINGERPRINT_SAMPLES = 256
SAMPLE_BYTES = 4096


class ConversionError(Exception):
    """A model cannot be read or written; the message names the file and the problem."""


class StoredModel(abc.ABC):
    """A model on disk or in a bucket, whose weights are read slice by slice.

    Attributes:
      folder: the folder of the model, or its file.
      fields: the content of Hugging Face's config.json for the model.
      config: the configuration of the Flax module.
      parameters: the parameters of the Flax module.
    """

    folder: Folder
    fields: dict[str, Any]
    config: ModelConfig
    parameters: list[ParamSpec]

    @functools.cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """Names and contents of the tokenizer's files; empty if the model has no tokenizer."""
        return read_tokenizer_files(self.folder)

    @abc.abstractmethod
    def dtype(self, parameter: ParamSpec) -> np.dtype:
        """Returns the type of the arrays that `read` returns for a parameter."""

    @abc.abstractmethod
    def read(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a slice of a parameter and reads no other part of it from the disk.

        Args:
          parameter: one of `parameters`.
          index: a slice for each axis of the parameter.
        """

    @abc.abstractmethod
    def weights_fingerprint(self) -> str:
        """Returns a hash that identifies the weights, wherever they are stored.

        Raises:
          ConversionError: the weights are in a bucket.
        """

    def load(self, shapes: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters as global arrays; each process reads only its devices' shards.

        Args:
          shapes: nested dictionaries with a `jax.ShapeDtypeStruct` with a sharding for each
            parameter, such as `nnx.to_pure_dict` returns for an abstract state. Parameters that
            the stored model does not have are ignored.

        Raises:
          ConversionError: a weight is not finite.
        """
        loaded = self._load(shapes)
        self.check_finite(loaded)
        return loaded

    def check_finite(self, loaded: dict[str, Any]) -> None:
        """Checks, on the devices, that loaded parameters have no NaN and are not infinite.

        Raises:
          ConversionError: a parameter is not finite; the message names it.
        """
        wrong = [".".join(path) for path, ok in _are_finite(flatten_dict(loaded)).items() if not ok]
        if wrong:
            raise ConversionError(
                f"{self.folder} has values that are NaN or infinite in {', '.join(wrong)}: choose "
                "another checkpoint"
            )

    def _load(self, shapes: dict[str, Any]) -> dict[str, Any]:
        """Returns what `load` returns, not yet checked."""

        def load(parameter: ParamSpec, shape: Any) -> jax.Array:
            def read(index: Index | None) -> np.ndarray:
                assert index is not None
                return self.read(parameter, index).astype(shape.dtype)

            return jax.make_array_from_callback(shape.shape, shape.sharding, read)

        by_path = flatten_dict(shapes)
        return unflatten_dict({p.path: load(p, by_path[p.path]) for p in self.parameters})

    def _check_tensor_names(self, expected: Set[str], present: Set[str]) -> None:
        """Raises a ConversionError unless exactly the expected tensors are present."""
        for verb, names in (("lacks", expected - present), ("has unknown", present - expected)):
            if names:
                shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
                raise ConversionError(f"{self.folder} {verb} {len(names)} tensors: {shown}")


@jax.jit
def _are_finite(arrays: dict[Any, jax.Array]) -> dict[Any, jax.Array]:
    return {path: jnp.isfinite(array).all() for path, array in arrays.items()}


def hash_weights(prefix: str, files: Iterable[Path]) -> str:
    """Returns a hash of a string and of the sizes and samples of some files.

    The names and folders of the files do not change it.
    """
    total = hashlib.sha256(prefix.encode())
    for digest in sorted(_file_digest(path) for path in files):
        total.update(digest)
    return total.hexdigest()[:16]


def _file_digest(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    step = max(size // FINGERPRINT_SAMPLES, SAMPLE_BYTES)
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.digest()
