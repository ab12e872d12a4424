"""Weights to and from Hugging Face's safetensors, tensor by tensor and slice by slice."""

import os
from pathlib import Path

from grit_jax.bucket import in_bucket, open_bucket
from grit_jax.conversion.gguf_model import SUFFIX, GgufModel
from grit_jax.conversion.hugging_face import HuggingFaceModel
from grit_jax.conversion.lora_checkpoint import BASE_MODEL, LoraCheckpoint
from grit_jax.conversion.orbax_model import (
    COMMITTED,
    MODEL_CONFIG,
    PARAMETERS,
    Folder,
    OrbaxModel,
    read_item,
)
from grit_jax.conversion.safetensors_folder import ConversionError

__all__ = [
    "ConversionError",
    "GgufModel",
    "HuggingFaceModel",
    "LoraCheckpoint",
    "Model",
    "OrbaxModel",
    "open_model",
]

Model = HuggingFaceModel | GgufModel | OrbaxModel | LoraCheckpoint


def open_model(
    path: str | os.PathLike,
    head: str | Path | None = None,
    base: str | os.PathLike | None = None,
) -> Model:
    """Opens the model at `path`: a Hugging Face folder, a checkpoint, a run's folder, a GGUF file.

    Of a run's folder (the `--workdir` of training) the newest checkpoint is opened. One of low-rank
    updates is opened together with the model that they were trained on.

    Args:
      path: the folder or file. Checkpoints and runs may be in a bucket.
      head: see `HuggingFaceModel`.
      base: where the model of low-rank updates lies now, if not where it was.

    Raises:
      ConversionError: there is no model at `path`, or not the one that updates are of.
      BucketError: its bucket cannot be used.
    """
    path = open_bucket(path) if in_bucket(path) else Path(path)
    if isinstance(path, Path) and path.suffix == SUFFIX and path.is_file():
        _check_has_no_base(path, base)
        return GgufModel(path)
    if not path.is_dir():
        raise ConversionError(
            f"{path} is not there, or neither a folder nor a {SUFFIX} file (hf download NAME "
            "--local-dir FOLDER gets a model of the Hugging Face hub)"
        )
    checkpoints = path / "checkpoints"
    steps = [step for step in checkpoints.glob("*") if step.name.isdigit() and _is_whole(step)]
    if steps:
        path = max(steps, key=lambda step: int(step.name))
    if (path / PARAMETERS).is_dir():
        if not _is_whole(path):
            raise ConversionError(
                f"{path} has no {COMMITTED}: it was cut off while it was saved, or copied from a "
                f"disk. If it is whole, put that file into it and into each folder in it"
            )
        if not (path / MODEL_CONFIG).is_dir():
            raise ConversionError(f"{path} has no {MODEL_CONFIG}: it cannot be known what it is of")
        if (path / BASE_MODEL).is_dir():
            return LoraCheckpoint(path, _open_base(path, base))
        _check_has_no_base(path, base)
        return OrbaxModel(path)
    if isinstance(path, Path) and (path / "config.json").exists():
        return HuggingFaceModel(path, head)
    if (path / "config.json").exists():
        raise ConversionError(f"{path} is not on a disk: copy it to one (gcloud storage cp -r)")
    raise ConversionError(
        f"{path} is neither a Hugging Face folder (config.json and safetensors) nor a checkpoint"
    )


def _check_has_no_base(path: Folder, base: str | os.PathLike | None) -> None:
    if base is not None:
        raise ConversionError(f"{path} is whole: there is no base to it")


def _is_whole(checkpoint: Folder) -> bool:
    """Returns whether a checkpoint was finished: in a bucket it does not appear as a whole."""
    return not in_bucket(checkpoint) or (checkpoint / COMMITTED).exists()


def _open_base(path: Folder, moved_to: str | os.PathLike | None) -> Model:
    """Opens the model that a checkpoint of low-rank updates was trained on."""
    folder = moved_to or read_item(path, BASE_MODEL)["folder"]
    try:
        return open_model(folder)
    except ConversionError as error:
        raise ConversionError(
            f"{path} holds low-rank updates of {folder}: {error}. Say --base FOLDER if it has moved"
        ) from None
