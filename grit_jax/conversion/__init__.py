"""Stored models: Hugging Face folders, GGUF files, and Orbax checkpoints with or without LoRA."""

from grit_jax.conversion.gguf_model import GgufModel
from grit_jax.conversion.hugging_face import HuggingFaceModel
from grit_jax.conversion.lora_checkpoint import LoraCheckpoint
from grit_jax.conversion.opening import open_model
from grit_jax.conversion.orbax_model import OrbaxModel
from grit_jax.conversion.stored_model import ConversionError, StoredModel

__all__ = [
    "ConversionError",
    "GgufModel",
    "HuggingFaceModel",
    "LoraCheckpoint",
    "OrbaxModel",
    "StoredModel",
    "open_model",
]
