"""Weights to and from Hugging Face's safetensors, tensor by tensor and slice by slice."""

from pathlib import Path

from grit_jax.conversion.hugging_face import HuggingFaceModel
from grit_jax.conversion.orbax_model import MODEL_CONFIG, PARAMETERS, OrbaxModel
from grit_jax.conversion.safetensors_folder import ConversionError

__all__ = ["ConversionError", "HuggingFaceModel", "Model", "OrbaxModel", "open_model"]

Model = HuggingFaceModel | OrbaxModel


def open_model(path: Path, head: str | Path | None = None) -> Model:
    """Opens the model at `path`: a Hugging Face folder, a checkpoint, or a run's folder.

    Of a run's folder (the `--workdir` of training) the newest checkpoint is opened.

    Args:
      path: the folder.
      head: see `HuggingFaceModel`.

    Raises:
      ConversionError: there is no model at `path`.
    """
    if not path.is_dir():
        raise ConversionError(f"{path} is not there, or not a folder")
    checkpoints = path / "checkpoints"
    steps = [step for step in checkpoints.glob("*") if step.name.isdigit()]
    if steps:
        path = max(steps, key=lambda step: int(step.name))
    if (path / PARAMETERS).is_dir():
        if not (path / MODEL_CONFIG).is_dir():
            raise ConversionError(f"{path} has no {MODEL_CONFIG}: it cannot be known what it is of")
        return OrbaxModel(path)
    if (path / "config.json").exists():
        return HuggingFaceModel(path, head)
    raise ConversionError(
        f"{path} is neither a Hugging Face folder (config.json and safetensors) nor a checkpoint"
    )
