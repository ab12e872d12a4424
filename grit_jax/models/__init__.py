"""The decoder as Flax modules, independent of data, losses and training.

Conventions. One letter is one dimension in all of `grit_jax.models`:

    B  rows of a batch; a row may hold several packed texts
    S  positions of a row
    T  key positions: S without a cache, the slots of a row with one
    M  tokens, B x S: the rows one after the other
    D  hidden size
    V  vocabulary
    L  layers
    N  query heads
    K  key/value heads
    H  size of a head
    F  hidden size of the feed-forward network
    E  experts
    C  experts chosen for a token
    R  rows for experts: a copy of a token for each choice
    P  embedding size: D, or the size of the embedding projection

Words stand for other dimensions: texts, rank, devices, inputs, outputs. Hidden states are [M, D]
everywhere but in attention: a weight's gradient that sums over one axis, not two, takes a third of
the time on a CPU.
"""

from collections.abc import Mapping
from typing import Any, get_type_hints

from flax import nnx

from grit_jax.models.architecture import Architecture
from grit_jax.models.attention import AttentionError
from grit_jax.models.config import SETTINGS, LoraConfig, ModelConfig, typed_name
from grit_jax.models.decoder import Decoder, HeadError, Stream
from grit_jax.models.experts import RouterStatistics
from grit_jax.models.gemma import GEMMA3
from grit_jax.models.kv_cache import KVCache
from grit_jax.models.ministral import MINISTRAL3
from grit_jax.models.mistral import MISTRAL
from grit_jax.models.mixtral import MIXTRAL
from grit_jax.models.paged_cache import PagedCache
from grit_jax.models.qwen import QWEN2, QWEN3
from grit_jax.models.qwen_moe import QWEN3_MOE
from grit_jax.models.rotary import RopeScaling
from grit_jax.models.weights import WeightTable, linear_layers

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "AttentionError",
    "Decoder",
    "HeadError",
    "KVCache",
    "LoraConfig",
    "ModelConfig",
    "PagedCache",
    "RouterStatistics",
    "Stream",
    "causal_fields",
    "config_from_hugging_face",
    "config_to_hugging_face",
    "lora_layers",
    "make_config",
    "make_model",
    "unread_fields",
    "weights_of",
]

ARCHITECTURES: dict[str, Architecture] = {
    "gemma3": GEMMA3,
    "ministral3": MINISTRAL3,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
}


def make_config(architecture: str, **fields: Any) -> ModelConfig:
    """Returns a configuration with the architecture's defaults for all other fields.

    Args:
      architecture: a key of `ARCHITECTURES`.
      **fields: fields of `ModelConfig`.

    Raises:
      ValueError: the architecture or a field is unknown, or a value has another type or is
        impossible; the message names the field.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"config.model.architecture={architecture!r} must be one of {sorted(ARCHITECTURES)}"
        )
    if isinstance(scaling := fields.get("rope_scaling"), Mapping):
        fields["rope_scaling"] = RopeScaling.from_fields(dict(scaling))
    sizes = ARCHITECTURES[architecture].sizes
    types = get_type_hints(ModelConfig)
    if unknown := fields.keys() - sizes.keys() - set(SETTINGS):
        raise ValueError(
            f"config.model.sizes: a {architecture} has no {', '.join(sorted(unknown))}"
        )
    for name, value in fields.items():
        wanted = types[name]
        allowed = (int, float) if wanted is float else wanted
        # In Python, True is an int.
        if not isinstance(value, allowed) or isinstance(value, bool) != (wanted is bool):
            in_words = getattr(wanted, "__name__", wanted)
            raise ValueError(f"{typed_name(name)}={value!r} must be of type {in_words}")
        if wanted is int and value < 1:
            raise ValueError(f"{typed_name(name)} must be positive, not {value}")
    config = ModelConfig(**{"architecture": architecture, **sizes, **fields})
    lora_layers(config)
    return config


def make_model(config: ModelConfig, seed: int) -> Decoder:
    """Returns a model with random parameters.

    Low-rank updates have a random stream of their own, so that the other parameters do not depend
    on them.
    """
    rngs = nnx.Rngs(params=seed, lora=seed + 1)
    return Decoder(config, ARCHITECTURES[config.architecture], rngs=rngs)


def weights_of(config: ModelConfig) -> WeightTable:
    """Returns the declaration of every weight of a model, by path."""
    return ARCHITECTURES[config.architecture].weights(config)


def lora_layers(config: ModelConfig) -> list[str]:
    """Returns the names of the linear layers with a low-rank update, such as "attention.query".

    Raises:
      ValueError: a pattern of `config.lora.targets` matches no layer; the message names it.
    """
    if config.lora is None:
        return []
    return config.lora.matching(linear_layers(weights_of(config)))


def config_from_hugging_face(fields: Mapping[str, Any]) -> ModelConfig:
    """Returns the configuration that the content of a Hugging Face `config.json` describes.

    Both the older `rope_theta` and the newer `rope_parameters` are read. Fields that the file
    leaves out have the default of transformers.

    Raises:
      ValueError: the architecture, or a field's value, is not supported; the message names the
        field.
    """
    return _architecture_of(fields).config_from_hugging_face(fields)


def causal_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a Hugging Face `config.json`, as it is for causal attention.

    Raises:
      ValueError: the architecture is not supported.
    """
    return _architecture_of(fields).causal_fields(fields)


def unread_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a Hugging Face `config.json` that may matter but are not read.

    Raises:
      ValueError: the architecture is not supported.
    """
    return _architecture_of(fields).unread_fields(fields)


def _architecture_of(fields: Mapping[str, Any]) -> Architecture:
    by_type = {
        written.model_type: architecture
        for architecture in ARCHITECTURES.values()
        for written in architecture.formats
    }
    model_type = fields.get("model_type")
    if model_type not in by_type:
        raise ValueError(
            f"config.json: model_type={model_type!r} must be one of {', '.join(sorted(by_type))}"
        )
    return by_type[model_type]


def config_to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """Returns the content of a `config.json` that old and new versions of transformers read."""
    return ARCHITECTURES[config.architecture].config_to_hugging_face(config)
