"""The Flax modules: they know nothing of data, losses or training."""

import dataclasses
from typing import Any, get_type_hints

from flax import nnx

from grit_jax.models.attention import AttentionError
from grit_jax.models.kv_cache import KVCache
from grit_jax.models.hugging_face import config_from_hugging_face, config_to_hugging_face
from grit_jax.models.linear import LoraConfig
from grit_jax.models.decoder import Decoder, ModelConfig, Stream
from grit_jax.models.mixtral import Mixtral, MixtralConfig, RouterStatistics

__all__ = [
    "ARCHITECTURES",
    "AttentionError",
    "KVCache",
    "LoraConfig",
    "Decoder",
    "ModelConfig",
    "Mixtral",
    "MixtralConfig",
    "RouterStatistics",
    "Stream",
    "config_from_hugging_face",
    "config_to_hugging_face",
    "make_config",
    "make_model",
]

ARCHITECTURES = {"mistral": (ModelConfig, Decoder), "mixtral": (MixtralConfig, Mixtral)}


def make_config(architecture: str, **fields: Any) -> ModelConfig:
    """Returns the configuration of a "mistral" or "mixtral" with these fields.

    Raises:
      ValueError: the architecture or a field is unknown, of another type, or a size impossible.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"config.model.architecture={architecture!r} must be one of {sorted(ARCHITECTURES)}"
        )
    config_class, _ = ARCHITECTURES[architecture]
    hints = get_type_hints(config_class)
    types = {field.name: hints[field.name] for field in dataclasses.fields(config_class)}
    if unknown := fields.keys() - types.keys():
        raise ValueError(f"config.model: a {architecture} has no {', '.join(sorted(unknown))}")
    for name, value in fields.items():
        wanted = types[name]
        allowed = (int, float) if wanted is float else wanted
        # To Python, True is a number as well.
        if not isinstance(value, allowed) or isinstance(value, bool) != (wanted is bool):
            in_words = getattr(wanted, "__name__", wanted)
            raise ValueError(f"config.model.{name}={value!r} must be of type {in_words}")
    return config_class(**fields)


def make_model(config: ModelConfig, seed: int) -> Decoder:
    """Returns the model of this configuration with random parameters.

    Those of low-rank updates are of a stream of their own: the others are the same without them.
    """
    for config_class, model_class in ARCHITECTURES.values():
        if type(config) is config_class:
            return model_class(config, rngs=nnx.Rngs(params=seed, lora=seed + 1))
    raise TypeError(f"no model has a configuration of type {type(config).__name__}")
