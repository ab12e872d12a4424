"""The tensors in a Hugging Face folder of safetensors, read slice by slice."""

from collections.abc import Iterator, Mapping
import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grit_jax.conversion.stored_model import ConversionError
from grit_jax.models.weights import DENSE

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The start of the placeholder that `git clone` without LFS leaves instead of a large file.
GIT_LFS = b"version https://git-lfs"


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, in one file or in several with an index.

    The constructor reads only the files' headers. Tensors have the names that transformers gives
    them: the second `model.` prefix that the original GritLM's trainer writes is removed, and the
    prefix that embedding-only checkpoints lack is added.

    Raises:
      ConversionError: there are no safetensors, or a file is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._tensors: dict[str, _Tensor] = {}
        for path in _files(folder):
            self._tensors |= {_standard_name(t.stored_name): t for t in _tensors(path)}
        dense = folder / DENSE / SINGLE
        if dense.exists():
            self._tensors |= {f"{DENSE}/{t.stored_name}": t for t in _tensors(dense)}

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self._tensors)

    def path(self, name: str) -> Path:
        """Returns the path of the file that holds a tensor."""
        return self._tensors[name].path

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """Returns safetensors' name of the type of a tensor."""
        return self._tensors[name].dtype

    def read(self, name: str, index: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
        """Returns a slice of a tensor and reads nothing else from the disk."""
        tensor = self._tensors[name]
        # An open file keeps everything read from it in memory, so it is opened for each slice.
        with _open(tensor.path) as file:
            return file.get_slice(tensor.stored_name)[index]


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """The file of a tensor, and the tensor's entry in the header."""

    path: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str


def _tensors(path: Path) -> Iterator[_Tensor]:
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118  it is not a dictionary
            tensor = file.get_slice(name)
            yield _Tensor(path, name, tuple(tensor.get_shape()), tensor.get_dtype())


def write_tensors(path: Path, tensors: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    """Writes a file of tensors, readable by whoever can read its folder."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read.


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file.

    Raises:
      ConversionError: the file is missing or does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(
            f"{path} does not exist; is {path.parent} a model's folder?"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} does not hold a JSON object")
    return content


def _files(folder: Path) -> list[Path]:
    """Returns the paths of the folder's safetensors."""
    if (folder / SINGLE).exists():  # It goes before an index, as in transformers.
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map", {})
        paths = [folder / name for name in sorted(set(weight_map.values()))]
        for path in paths:
            if not path.exists():
                raise ConversionError(f"{path} is missing, but {folder / INDEX} names it")
        return paths
    pickles = sorted(
        path.name for ending in ("*.bin", "*.pt", "*.pth") for path in folder.glob(ending)
    )
    if pickles:
        raise ConversionError(
            f"{folder / pickles[0]} is a pickle, which can run any code when it is loaded: load "
            "the model with transformers and save it with save_pretrained() as safetensors"
        )
    raise ConversionError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        with path.open("rb") as file:
            if file.read(len(GIT_LFS)) == GIT_LFS:
                raise ConversionError(
                    f"{path} is a placeholder of git lfs: git lfs pull downloads its content"
                ) from None
        raise ConversionError(f"{path} is damaged or cut off: {error}") from None


def _standard_name(name: str) -> str:
    """Returns transformers' name of a tensor of a causal language model."""
    while name.startswith("model.model.") or name.startswith("model.lm_head."):
        name = name.removeprefix("model.")
    is_bare = name.startswith(("layers.", "embed_tokens.", "norm."))
    return f"model.{name}" if is_bare else name
