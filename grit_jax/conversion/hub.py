"""Models on the Hugging Face Hub."""

import os
from pathlib import Path
import re

from grit_jax.bucket import one_line
from grit_jax.conversion.stored_model import ConversionError

# OWNER/MODEL
NAME = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
# Mistral's own format, and copies of the weights in folders; a projection of embeddings is in one.
LEFT_OUT = ("consolidated*", "original/*", "onnx/*", "openvino/*", "lora/*")


def find_folder(path: str | os.PathLike) -> Path:
    """Returns a path, or, for the name OWNER/MODEL of a model on the Hub, its folder in the cache.

    Files that the cache lacks are downloaded. A name whose OWNER is a local folder is a path.

    Raises:
      ConversionError: there is no such model, or it cannot be downloaded.
    """
    return _download(str(path)) if is_hub_name(path) else Path(path)


def is_hub_name(path: str | os.PathLike) -> bool:
    """Returns whether a path is the name OWNER/MODEL of a model on the Hub."""
    local = Path(path)
    if local.exists() or local.parent.is_dir():
        return False
    return NAME.fullmatch(str(path)) is not None


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConversionError(
            f"{name} does not exist; if it is a model on the Hugging Face Hub, pip install "
            "huggingface_hub, or download it: hf download NAME --local-dir FOLDER"
        ) from None
    try:
        folder = snapshot_download(name, allow_patterns=[*FILES], ignore_patterns=[*LEFT_OUT])
    except Exception as error:  # The Hub and the network raise many types.
        raise ConversionError(
            f"{name} does not exist here, and cannot be downloaded from the Hugging Face Hub: "
            f"{one_line(error)}"
        ) from None
    return Path(folder)
