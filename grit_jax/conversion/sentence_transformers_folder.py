"""What a folder says about how its model embeds: config.json and sentence-transformers' files."""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
from typing import Any

from grit_jax.conversion.safetensors_folder import read_json
from grit_jax.conversion.sidecar_files import (
    IDENTITY,
    MODULES,
    POOLING_FIELDS,
    SENTENCE_TRANSFORMERS,
    TRANSFORMER_SETTINGS,
)
from grit_jax.conversion.stored_model import ConversionError, warn
from grit_jax.models.weights import DENSE
from grit_jax.objectives.embedding import GRIT_FIELD
from grit_jax.text.templates import template_of_prompt

KINDS = ("query", "document")
# The modules that are computed; a linear layer is one of an export.
COMPUTED = ("Transformer", "Pooling", "Normalize")
# The file with code of the original GritLM's models, which compute what is computed here.
GRITLM_CODE = "modeling_gritlm"
# Model types of bidirectional models with code of their own, and their types in transformers.
BIDIRECTIONAL_TYPES = {"llama_bidirec": "llama"}
# Their field `pooling`.
BIDIRECTIONAL_POOLINGS = {"avg": "mean", "cls": "cls", "last": "lasttoken"}


def standard_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a config.json with a model type of transformers.

    The fields of a bidirectional type that are left out have no effect, or `read_embedding_fields`
    reads them.
    """
    fields = dict(config)
    if fields.get("model_type") in BIDIRECTIONAL_TYPES:
        fields |= {"model_type": BIDIRECTIONAL_TYPES[fields["model_type"]], "is_causal": False}
        for name in ("pooling", "temperature", "auto_map"):
            fields.pop(name, None)
    return fields


def read_embedding_fields(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields of an `EmbeddingSpec`, as far as the folder has them.

    An export of grit-jax has only prompts here: the others are in config.json. A model of others
    embeds as in sentence-transformers: with causal attention, unless config.json says otherwise;
    without a prompt, unless the folder has one; and pooling its prompts, unless the folder says
    otherwise. It warns (`ConversionWarning`) of what is computed in another way.

    Args:
      folder: the model's folder.
      config: the content of its config.json.

    Raises:
      ConversionError: a file is damaged.
    """
    prompts = _read_prompts(folder / SENTENCE_TRANSFORMERS)
    if GRIT_FIELD in config:
        return prompts
    modules = _read_modules(folder / MODULES)
    fields: dict[str, Any] = {}
    if (attention := _attention(folder, config, modules)) is not None:
        fields["attention"] = attention
    if config.get("model_type") in BIDIRECTIONAL_TYPES:
        fields |= _defaults_of_bidirectional_type(folder, config)
    if not modules:
        return fields | prompts
    if not _has_gritlm_code(config):
        fields |= {f"{kind}_prompt": "" for kind in KINDS}
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    fields["normalize"] = "Normalize" in kinds
    computed = {*COMPUTED, "Dense"} if _projection(folder, modules) else COMPUTED
    others = []
    for kind, module in zip(kinds, modules, strict=True):
        if kind == "Pooling":
            fields |= _read_pooling(folder / module["path"] / "config.json")
        elif kind not in computed:
            others.append(f"{kind} ({module['path']})")
    if others:
        warn(f"{folder / MODULES}: embeddings are computed without {', '.join(others)}")
    if template := template_of_prompt(prompts.get("query_prompt", "")):
        fields["template"] = template
    return fields | prompts


def read_projection_fields(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a `ModelConfig` for the linear layers that follow pooling.

    In an export of grit-jax, config.json has them.

    Args:
      folder: the model's folder.
      config: the content of its config.json.

    Raises:
      ConversionError: a file is damaged.
    """
    return {} if GRIT_FIELD in config else _projection(folder, _read_modules(folder / MODULES))


def _projection(folder: Path, modules: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Returns the fields of the linear layers; none if there are no layers, or others than ours."""
    paths = [module["path"] for module in modules if module["type"].endswith(".Dense")]
    if not paths or tuple(paths) != DENSE[: len(paths)]:
        return {}
    layers = [read_json(folder / path / "config.json") for path in paths]
    is_linear = all(
        layer.get("activation_function") == IDENTITY and not layer.get("use_residual")
        for layer in layers
    )
    biases = {layer.get("bias", True) for layer in layers}
    if not is_linear or len(biases) > 1:
        return {}
    fields = {
        "embedding_projection_size": layers[-1].get("out_features"),
        "embedding_projection_bias": biases.pop(),
    }
    if len(layers) > 1:
        fields["embedding_projection_hidden_size"] = layers[0].get("out_features")
    return fields


def _read_prompts(path: Path) -> dict[str, str]:
    prompts = (read_json(path).get("prompts") or {}) if path.is_file() else {}
    return {f"{k}_prompt": prompts[k] for k in KINDS if isinstance(prompts.get(k), str)}


def _read_modules(path: Path) -> list[dict[str, str]]:
    """Returns the modules of sentence-transformers, none without their file."""
    if not path.is_file():
        return []
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        return [{"type": str(module["type"]), "path": str(module["path"])} for module in modules]
    except (ValueError, TypeError, KeyError) as error:
        raise ConversionError(f"{path} is not a list of modules: {error!r}") from None


def _attention(
    folder: Path, config: Mapping[str, Any], modules: Sequence[Mapping[str, str]]
) -> str | None:
    """Returns the attention pattern that the folder says, or None if it says none."""
    path = folder / TRANSFORMER_SETTINGS
    settings = read_json(path) if path.is_file() else {}
    said = dict(config)
    for name in ("config_args", "config_kwargs"):  # Two names of one field.
        said |= settings.get(name) or {}
    is_bidirectional = config.get("model_type") in BIDIRECTIONAL_TYPES
    is_bidirectional |= said.get("use_bidirectional_attention") is True
    if is_bidirectional or said.get("is_causal") is False:
        return "bbcc"
    if not modules or _has_gritlm_code(config):
        return None
    code = sorted({name.partition(".")[0] for name in _own_code(config, modules)})
    if code and "is_causal" not in said:
        warn(
            f"{folder}: attention is taken to be bidirectional, since config.json has no is_causal "
            f"and the model's code ({', '.join(code)}) is not run: pass attention='bbcc' or 'cccc'"
        )
        return "bbcc"
    return "cccc"


def _own_code(config: Mapping[str, Any], modules: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns the classes of a model that come with its folder."""
    transformer = modules[0]["type"]
    own = [] if transformer.startswith("sentence_transformers.") else [transformer]
    classes = config.get("auto_map") or {}
    return own + [str(name) for kind, name in classes.items() if kind.startswith("AutoModel")]


def _has_gritlm_code(config: Mapping[str, Any]) -> bool:
    return any(GRITLM_CODE in str(name) for name in (config.get("auto_map") or {}).values())


def _defaults_of_bidirectional_type(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `BIDIRECTIONAL_TYPES` do without files of sentence-transformers."""
    name = config.get("pooling", "avg")
    if name not in BIDIRECTIONAL_POOLINGS:
        raise ConversionError(
            f"{folder / 'config.json'}: pooling={name!r} is not supported, only "
            f"{', '.join(BIDIRECTIONAL_POOLINGS)}"
        )
    prompts = {f"{kind}_prompt": "" for kind in KINDS}
    return {"pooling": BIDIRECTIONAL_POOLINGS[name], "pool_instruction": True, **prompts}


def _read_pooling(path: Path) -> dict[str, Any]:
    settings = read_json(path)
    names = {field: pooling for pooling, field in POOLING_FIELDS.items()}
    modes = [names.get(name, name) for name in settings if _is_mode(name) and settings[name]]
    modes = settings.get("pooling_mode", modes or "mean")
    pooling = modes[0] if isinstance(modes, list) and len(modes) == 1 else modes
    if not isinstance(pooling, str) or pooling not in POOLING_FIELDS:
        warn(f"{path}: pooling {pooling!r} is not supported: embeddings are pooled by 'mean'")
        pooling = "mean"
    includes_prompt = settings.get("include_prompt", True)
    if pooling == "weightedmean" and not includes_prompt:
        warn(
            f"{path}: tokens are weighted by their index in the text, not in the prompt and the "
            "text as in sentence-transformers: embed without a prompt for the same embeddings"
        )
    return {"pooling": pooling, "pool_instruction": includes_prompt}


def _is_mode(name: str) -> bool:
    return name.startswith("pooling_mode_")
