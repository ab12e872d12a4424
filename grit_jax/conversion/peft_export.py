"""Exports the adapter of a LoRA checkpoint in PEFT's format."""

from pathlib import Path
from typing import Any

import numpy as np

from grit_jax.conversion.adapted_model import LowRankUpdate
from grit_jax.conversion.atomic_folder import atomic_folder
from grit_jax.conversion.hub import name_in_cache
from grit_jax.conversion.hugging_face import HuggingFaceModel
from grit_jax.conversion.layout import ParamSpec
from grit_jax.conversion.lora_checkpoint import LoraCheckpoint
from grit_jax.conversion.model_card import write_card
from grit_jax.conversion.peft_adapter import GRIT_SETTINGS, STACKED
from grit_jax.conversion.safetensors_folder import ADAPTER, ADAPTER_CONFIG, write_tensors
from grit_jax.conversion.sidecar_files import write_chat_template, write_json, write_tokenizer
from grit_jax.conversion.stored_model import ConversionError, StoredModel
from grit_jax.conversion.stored_tokenizer import find_tokenizer
from grit_jax.objectives.embedding import GRIT_FIELD, EmbeddingSpec


def write_adapter(
    model: StoredModel,
    folder: Path,
    spec: EmbeddingSpec,
    *,
    base_name: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "float32",
    license_name: str | None = None,
) -> None:
    """Writes the adapter of a LoRA checkpoint as a folder that PEFT and `GritLM` load.

    PEFT's own files cannot say how the model embeds; `grit_config.json` does. If writing fails,
    nothing is left behind.

    Args:
      model: the checkpoint.
      folder: the folder to create.
      spec: how the model embeds.
      base_name: the base model's name or folder in adapter_config.json; None for its name on the
        Hub, or else its folder.
      tokenizer: see `open_tokenizer`; by default see `find_tokenizer`.
      dtype: type of the matrices, a name of NumPy's or ml_dtypes'.
      license_name: see `write_card`.

    Raises:
      ConversionError: the folder exists, the model is not a LoRA checkpoint, PEFT's format cannot
        hold its adapter, or a weight is not finite.
      FileNotFoundError, TokenizerError: the tokenizer is missing or damaged.
    """
    if not isinstance(model, LoraCheckpoint):
        raise ConversionError(f"{model.folder} is not a LoRA checkpoint: leave out --adapter")
    _check(model)
    settings = _settings(model, base_name)
    found = find_tokenizer(model, tokenizer)
    with atomic_folder(folder) as unfinished:
        unfinished.mkdir()
        tensors: dict[str, np.ndarray] = {}
        for parameter in model.parameters:
            if parameter.path in model.adapted:
                tensors |= _tensors(model, parameter, np.dtype(dtype))
        write_tensors(unfinished / ADAPTER, tensors)
        write_json(unfinished / ADAPTER_CONFIG, settings)
        write_json(unfinished / GRIT_SETTINGS, spec.to_fields()[GRIT_FIELD])
        if found is not None:
            length = model.config.max_position_embeddings
            write_tokenizer(found, unfinished, model.fields["model_type"], length)
            write_chat_template(unfinished, found)
        write_card(unfinished, folder.name, model, spec, license_name)


def _check(model: LoraCheckpoint) -> None:
    """Checks that PEFT's format can hold the adapter."""
    if model.stored_whole:
        raise ConversionError(
            f"{model.folder} has an embedding projection, which PEFT's format cannot hold: leave "
            "out --adapter to export the merged model"
        )
    gate_and_up = set(STACKED["gate_up_proj"])
    if model.config.num_local_experts and len(gate_and_up & model.adapted) == 1:
        raise ConversionError(
            f"{model.folder} adapts only one of the experts' feed_forward.gate and "
            "feed_forward.up, which PEFT adapts together: leave out --adapter to export the merged "
            "model"
        )


def _settings(model: LoraCheckpoint, base_name: str | None) -> dict[str, Any]:
    """Returns the content of adapter_config.json."""
    revision = None
    if base_name is None:
        if not isinstance(model.base, HuggingFaceModel):
            raise ConversionError(
                f"{model.base.folder} is not a Hugging Face folder, as PEFT needs it: name the "
                "same base model in this format with --base-name NAME_OR_FOLDER"
            )
        folder = Path(model.base.folder)
        base_name, revision = name_in_cache(folder) or (str(folder), None)
    alpha = model.lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.config.has_lm_head else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": model.lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(_modules(model)),
    }


def _modules(model: LoraCheckpoint) -> set[str]:
    """Returns the names of the adapted modules in their layers, such as "q_proj"."""
    names = (p.name for p in model.parameters if p.path in model.adapted)
    return {name.removesuffix(".weight").rpartition(".")[2] for name in names}


def _tensors(model: LoraCheckpoint, parameter: ParamSpec, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Returns the matrices of a parameter's update, by PEFT's names."""
    update = model.update(parameter)
    tensors = {}
    for index, name in parameter.tensors():
        module = name.removesuffix(".weight")
        if not model.config.has_lm_head:  # The class of transformers without a head.
            module = module.removeprefix("model.")
        for letter, matrix in zip("AB", _matrices(update, parameter, index), strict=True):
            full_name = f"base_model.model.{module}.lora_{letter}.weight"
            with np.errstate(over="ignore"):
                tensors[full_name] = np.ascontiguousarray(matrix).astype(dtype)
            if not np.isfinite(tensors[full_name]).all():
                raise ConversionError(
                    f"{full_name} has values that are NaN or infinite as {dtype.name}: choose "
                    "another checkpoint, or --dtype float32"
                )
    return tensors


def _matrices(
    update: LowRankUpdate, parameter: ParamSpec, index: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns A [rank, inputs] and B [outputs, rank] of one tensor."""
    outputs, inputs = parameter.tensor_shape
    rank = update.a.shape[-1]
    return update.a[index].reshape(inputs, rank).T, update.b[index].reshape(rank, outputs).T
