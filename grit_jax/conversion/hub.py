"""Models on the Hugging Face Hub."""

import os
from pathlib import Path
import re

from grit_jax.bucket import one_line
from grit_jax.conversion.stored_model import ConversionError

# OWNER/MODEL, which may have this prefix.
NAME, PREFIX = re.compile(r"[\w.-]+/[\w.-]+"), "hf:"
# The folder of a model in the cache.
CACHED = re.compile(r"/models--(?P<owner>[\w.-]+?)--(?P<model>[\w.-]+)/snapshots/(?P<commit>\w+)$")
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md")
# Mistral's own format, and copies of the weights in folders; a projection of embeddings is in one.
LEFT_OUT = ("consolidated*", "original/*", "onnx/*", "openvino/*", "lora/*")


def find_folder(path: str | os.PathLike, revision: str | None = None) -> Path:
    """Returns a path, or, for the name OWNER/MODEL of a model on the Hub, its folder in the cache.

    Files that the cache lacks are downloaded. A name whose OWNER is a local folder is a path, but
    hf:OWNER/MODEL is always a name.

    Args:
      path: a path or a name.
      revision: a branch, a tag or a commit of a model on the Hub; None for the newest.

    Raises:
      ConversionError: there is no such model, or it cannot be downloaded.
    """
    return _download(_without_prefix(path), revision) if is_hub_name(path) else Path(path)


def is_hub_name(path: str | os.PathLike) -> bool:
    """Returns whether a path is the name of a model on the Hub: hf:OWNER/MODEL, or OWNER/MODEL.

    Raises:
      ConversionError: it begins with "hf:" and has another form.
    """
    local, name = Path(path), _without_prefix(path)
    if str(path).startswith(PREFIX):
        check_name(name)
        return True
    return not (local.exists() or local.parent.is_dir()) and NAME.fullmatch(name) is not None


def _without_prefix(path: str | os.PathLike) -> str:
    return str(path).removeprefix(PREFIX)


def name_in_cache(folder: Path) -> tuple[str, str] | None:
    """Returns the name and the commit of a model in the Hub's cache, None for other folders."""
    found = CACHED.search(folder.as_posix())
    return (f"{found['owner']}/{found['model']}", found["commit"]) if found else None


def check_name(name: str) -> None:
    """Checks that a name has the form OWNER/MODEL.

    Raises:
      ConversionError: it does not.
    """
    if not NAME.fullmatch(name):
        raise ConversionError(f"{name!r} is not a name on the Hugging Face Hub: use OWNER/MODEL")


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=[*FILES], ignore_patterns=[*LEFT_OUT]
        )
    except Exception as error:  # The Hub and the network raise many types.
        raise ConversionError(
            f"{name} does not exist here, and cannot be downloaded from the Hugging Face Hub: "
            f"{one_line(error)}"
        ) from None
    return Path(folder)
