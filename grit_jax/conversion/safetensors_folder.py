"""The tensors in a Hugging Face folder of safetensors, read slice by slice."""

from collections.abc import Iterator, Mapping
import dataclasses
import itertools
import json
import math
from pathlib import Path
import re
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
# The weights in Mistral's own format, and the weights and the description of a PEFT adapter.
MISTRAL_NATIVE = "consolidated*.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Modules that wrap a model or its layers, and appear in the names of its tensors: of PyTorch's
# compiler, data parallelism and FSDP.
WRAPPERS = re.compile(
    r"(^|\.)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)"
)
# The modules around a decoder: the original GritLM's trainer writes `model.model.`, PEFT
# `base_model.model.`, and models for images and text `language_model.`.
PREFIX = re.compile(
    r"^(?:(?:model|base_model|language_model)\.)+(?=(?:layers|embed_tokens|norm|lm_head)\.)"
)
# Tensors that stack the matrices of all experts, as transformers 5 has them in memory, and saves
# them with `save_original_format=False`; and the matrices of an expert that follow in its rows.
FUSED_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
FUSED_MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# Numbers of two tensors that are compared at a time.
COMPARED_NUMBERS = 2**24


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, in one file or in several with an index.

    The constructor reads only the files' headers. Tensors have the names that transformers gives
    them: the prefixes of wrappers are removed, and the prefix that embedding-only checkpoints lack
    is added.

    Args:
      folder: the folder.
      is_adapter: whether to read the tensors of a PEFT adapter in the folder, not of a model.

    Raises:
      ConversionError: there are no safetensors, a file is missing or damaged, or a tensor is there
        twice.
    """

    def __init__(self, folder: Path, *, is_adapter: bool = False):
        self.folder, self._is_adapter = folder, is_adapter
        self._tensors: dict[str, _Tensor] = {}
        paths, names_in_index = ([_adapter_file(folder)], set()) if is_adapter else _files(folder)
        for path in paths:
            for tensor in _tensors(path):
                for name, part in _split_experts(_standard_name(tensor.stored_name), tensor):
                    self._add(name, part)
        stored_names = {tensor.stored_name for tensor in self._tensors.values()}
        if missing := sorted(names_in_index - stored_names):
            raise ConversionError(
                f"{folder / INDEX} names {len(missing)} tensors that are in no file, such as "
                f"{missing[0]}: download the model again"
            )
        for name in DENSE:
            dense = folder / name / SINGLE
            if dense.exists():
                self._tensors |= {f"{name}/{t.stored_name}": t for t in _tensors(dense)}

    def _add(self, name: str, tensor: "_Tensor") -> None:
        if not self._is_adapter and (".lora_" in name or ".base_layer." in name):
            raise ConversionError(
                f"{tensor.path} holds LoRA updates of PEFT ({tensor.stored_name}): merge them with "
                "merge_and_unload(), and save the model with save_pretrained()"
            )
        if name in self._tensors:
            first = self._tensors[name]
            raise ConversionError(
                f"{first.path} ({first.stored_name}) and {tensor.path} ({tensor.stored_name}) both "
                f"hold {name}: remove one of them"
            )
        self._tensors[name] = tensor

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self._tensors)

    def path(self, name: str) -> Path:
        """Returns the path of the file that holds a tensor."""
        return self._tensors[name].path

    def stored_name(self, name: str) -> str:
        """Returns the name of a tensor in its file."""
        return self._tensors[name].stored_name

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """Returns safetensors' name of the type of a tensor."""
        return self._tensors[name].dtype

    def rename(self, name: str, to: str) -> None:
        """Gives a tensor another name."""
        self._tensors[to] = self._tensors.pop(name)

    def equal(self, first: str, second: str) -> bool:
        """Returns whether two tensors hold the same numbers; reads a few rows at a time."""
        (rows, *columns) = shape = self.shape(first)
        if shape != self.shape(second):
            return False
        step = max(1, COMPARED_NUMBERS // max(1, math.prod(columns)))
        rest = (slice(None),) * len(columns)
        starts = range(0, rows, step)
        parts = ((slice(start, min(start + step, rows)), *rest) for start in starts)
        return all(np.array_equal(self.read(first, p), self.read(second, p)) for p in parts)

    def read(self, name: str, index: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
        """Returns a slice of a tensor and reads nothing else from the disk."""
        tensor = self._tensors[name]
        # An open file keeps everything read from it in memory, so it is opened for each slice.
        with _open(tensor.path) as file:
            return file.get_slice(tensor.stored_name)[tensor.stored_index(index)]


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """The file of a tensor, and the tensor's entry in the header.

    Attributes:
      expert: index of a matrix in a tensor that stacks those of all experts; None for all others.
      first_row: row of that matrix where this tensor begins.
    """

    path: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str
    expert: int | None = None
    first_row: int = 0

    def stored_index(self, index: tuple[slice, ...]) -> tuple[int | slice, ...]:
        """Returns the index in the file of a slice of this tensor."""
        if self.expert is None:
            return index
        start, stop, _ = index[0].indices(self.shape[0])
        return self.expert, slice(self.first_row + start, self.first_row + stop), *index[1:]


def _tensors(path: Path) -> Iterator[_Tensor]:
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118  it is not a dictionary
            tensor = file.get_slice(name)
            yield _Tensor(path, name, tuple(tensor.get_shape()), tensor.get_dtype())


def _split_experts(name: str, tensor: _Tensor) -> Iterator[tuple[str, _Tensor]]:
    """Yields a tensor with its name, or the matrices of all experts that it stacks, with theirs."""
    fused = FUSED_EXPERTS.fullmatch(name)
    if fused is None or len(tensor.shape) != 3:
        yield name, tensor
        return
    num_experts, rows, columns = tensor.shape
    matrices = FUSED_MATRICES[fused[2]]
    height = rows // len(matrices)
    for expert, (i, matrix) in itertools.product(range(num_experts), enumerate(matrices)):
        part = dataclasses.replace(
            tensor, shape=(height, columns), expert=expert, first_row=i * height
        )
        yield f"{fused[1]}.{expert}.{matrix}.weight", part


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


def _files(folder: Path) -> tuple[list[Path], set[str]]:
    """Returns the paths of the folder's safetensors, and the tensors that an index names."""
    if (folder / SINGLE).exists():  # It goes before an index, as in transformers.
        return [folder / SINGLE], set()
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map", {})
        paths = [folder / name for name in sorted(set(weight_map.values()))]
        for path in paths:
            if not path.exists():
                raise ConversionError(f"{path} is missing, but {folder / INDEX} names it")
        return paths, set(weight_map)
    pickles = sorted(
        path.name for ending in ("*.bin", "*.pt", "*.pth") for path in folder.glob(ending)
    )
    if pickles:
        raise ConversionError(
            f"{folder / pickles[0]} is a pickle, which can run any code when it is loaded: load "
            "the model with transformers and save it with save_pretrained() as safetensors"
        )
    if any(folder.glob(MISTRAL_NATIVE)):
        raise ConversionError(
            f"{folder} has weights in Mistral's own format ({MISTRAL_NATIVE}), but neither "
            f"{SINGLE} nor {INDEX}: download the model in Hugging Face's format"
        )
    raise ConversionError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _adapter_file(folder: Path) -> Path:
    if (folder / ADAPTER).is_file():
        return folder / ADAPTER
    raise ConversionError(
        f"{folder} has {ADAPTER_CONFIG}, but no {ADAPTER}: load the adapter with PEFT and save it "
        "with save_pretrained()"
    )


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
    name = WRAPPERS.sub("", name).removeprefix(".")
    name = PREFIX.sub("", name)
    is_bare = name.startswith(("layers.", "embed_tokens.", "norm."))
    return f"model.{name}" if is_bare else name
