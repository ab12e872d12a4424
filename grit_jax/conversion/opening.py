"""Opens a stored model of any format."""

import os
from pathlib import Path

from grit_jax.bucket import in_bucket, open_bucket
from grit_jax.conversion.gguf_model import SUFFIX, GgufModel
from grit_jax.conversion.hub import find_folder
from grit_jax.conversion.hugging_face import HuggingFaceModel
from grit_jax.conversion.lora_checkpoint import BASE_MODEL, LoraCheckpoint
from grit_jax.conversion.orbax_model import (
    COMMIT_FILE,
    MODEL_CONFIG,
    PARAMETERS,
    OrbaxModel,
    read_item,
)
from grit_jax.conversion.peft_adapter import PeftAdapter
from grit_jax.conversion.peft_settings import PeftSettings
from grit_jax.conversion.safetensors_folder import ADAPTER_CONFIG, INDEX, SINGLE
from grit_jax.conversion.stored_model import ConversionError, Folder, StoredModel


def open_model(
    path: str | os.PathLike,
    head: str | Path | None = None,
    base: str | os.PathLike | None = None,
) -> StoredModel:
    """Opens a Hugging Face folder, a GGUF file, a checkpoint, or the newest checkpoint of a run.

    A LoRA checkpoint or a PEFT adapter is opened together with its base model.

    Args:
      path: the folder or file. A run's folder is the `--workdir` of training. Checkpoints and runs
        may be in a bucket. OWNER/MODEL is downloaded from the Hugging Face Hub.
      head: see `HuggingFaceModel`.
      base: the path or name of the base model of a LoRA checkpoint or PEFT adapter, if it is not
        the one that is stored there.

    Raises:
      ConversionError: there is no model at `path`, or the base model is missing or has other
        weights.
      BucketError: the bucket cannot be read.
    """
    path = open_bucket(path) if in_bucket(path) else find_folder(path)
    if isinstance(path, Path) and path.suffix == SUFFIX and path.is_file():
        _check_no_base(path, base)
        return GgufModel(path)
    if not path.is_dir():
        raise ConversionError(
            f"{path} does not exist, or is neither a folder, nor a {SUFFIX} file, nor the name "
            "OWNER/MODEL of a model on the Hugging Face Hub"
        )
    checkpoints = path / "checkpoints"
    steps = [step for step in checkpoints.glob("*") if step.name.isdigit() and _is_complete(step)]
    if steps:
        path = max(steps, key=lambda step: int(step.name))
    if (path / PARAMETERS).is_dir():
        return _open_checkpoint(path, base)
    if isinstance(path, Path) and _is_adapter(path):
        return PeftAdapter(path, _open_base_of_adapter(path, base))
    if isinstance(path, Path) and (path / "config.json").exists():
        _check_no_base(path, base)
        return HuggingFaceModel(path, head)
    if (path / "config.json").exists():
        raise ConversionError(f"{path} is not on a disk: copy it to one (gcloud storage cp -r)")
    raise ConversionError(
        f"{path} is neither a Hugging Face folder (config.json and safetensors) nor a checkpoint"
    )


def _open_checkpoint(folder: Folder, base: str | os.PathLike | None) -> StoredModel:
    if not _is_complete(folder):
        raise ConversionError(
            f"{folder} has no {COMMIT_FILE}: it was only partly saved, or copied from a disk. If "
            "it is complete, put that file into it and into each folder in it"
        )
    if not (folder / MODEL_CONFIG).is_dir():
        raise ConversionError(f"{folder} has no {MODEL_CONFIG}: its model cannot be determined")
    if (folder / BASE_MODEL).is_dir():
        return LoraCheckpoint(folder, _open_base(folder, base))
    _check_no_base(folder, base)
    return OrbaxModel(folder)


def _check_no_base(path: Folder, base: str | os.PathLike | None) -> None:
    if base is not None:
        raise ConversionError(f"{path} is a full model and has no base model: leave out --base")


def _is_adapter(folder: Path) -> bool:
    """Returns whether a folder has a PEFT adapter, and no model next to it."""
    has_model = (folder / SINGLE).exists() or (folder / INDEX).exists()
    return (folder / ADAPTER_CONFIG).exists() and not has_model


def _is_complete(checkpoint: Folder) -> bool:
    """Returns whether a checkpoint was saved to its end.

    A folder in a bucket cannot be renamed at once, so Orbax marks it with a file instead.
    """
    return not in_bucket(checkpoint) or (checkpoint / COMMIT_FILE).exists()


def _open_base(checkpoint: Folder, moved_to: str | os.PathLike | None) -> StoredModel:
    """Opens the base model of a LoRA checkpoint."""
    folder = moved_to or read_item(checkpoint, BASE_MODEL)["folder"]
    try:
        return open_model(folder)
    except ConversionError as error:
        raise ConversionError(
            f"{checkpoint} is a LoRA checkpoint of {folder}: {error}. If the base model has moved, "
            "use --base FOLDER"
        ) from None


def _open_base_of_adapter(folder: Path, given: str | os.PathLike | None) -> StoredModel:
    """Opens the base model of a PEFT adapter."""
    settings = PeftSettings.read(folder)
    name = given or settings.base
    if not name:
        raise ConversionError(
            f"{folder / ADAPTER_CONFIG} names no base_model_name_or_path: name the base model "
            "(base=, --base)"
        )
    try:
        return open_model(name if given else find_folder(name, settings.revision))
    except ConversionError as error:
        raise ConversionError(
            f"{folder} is a PEFT adapter of {name}: {error}. Name its base model with base= "
            "(--base)"
        ) from None
