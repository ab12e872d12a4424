"""What the files of sentence-transformers in a folder say about how its model embeds."""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

from grit_jax.conversion.safetensors_folder import read_json
from grit_jax.conversion.sidecar_files import POOLING_FIELDS, SENTENCE_TRANSFORMERS
from grit_jax.conversion.stored_model import ConversionError, warn
from grit_jax.objectives.embedding import GRIT_FIELD
from grit_jax.text.templates import template_of_prompt

MODULES = "modules.json"
KINDS = ("query", "document")
# The modules that are computed; a linear layer is one of an export.
COMPUTED = ("Transformer", "Pooling", "Normalize")


def read_embedding_fields(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns fields of an `EmbeddingSpec`, as far as the folder has them.

    An export of grit-jax has only prompts here: its attention and pooling are in config.json. A
    model of others embeds as in sentence-transformers: with causal attention, unless it has code of
    its own, and without a prompt, unless the folder has one. It warns (`ConversionWarning`) of what
    is computed in another way.

    Args:
      folder: the model's folder.
      config: the content of its config.json.

    Raises:
      ConversionError: a file is damaged.
    """
    path = folder / SENTENCE_TRANSFORMERS
    prompts = (read_json(path).get("prompts") or {}) if path.is_file() else {}
    fields = {f"{k}_prompt": prompts[k] for k in KINDS if isinstance(prompts.get(k), str)}
    if GRIT_FIELD in config or not (folder / MODULES).is_file():
        return fields
    if template := template_of_prompt(fields.get("query_prompt", "")):
        fields["template"] = template
    modules = _read_modules(folder / MODULES)
    transformer = modules[0]["type"] if modules else ""
    is_own = transformer.startswith("sentence_transformers.") and "auto_map" not in config
    if is_own and config.get("is_causal") is not False:
        defaults = {f"{kind}_prompt": "" for kind in KINDS}
        fields = {"attention": "cccc", **defaults, **fields}
    others = []
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            fields |= _read_pooling(folder / module["path"] / "config.json", fields)
        elif kind not in COMPUTED:
            others.append(f"{kind} ({module['path']})")
    if others:
        warn(f"{folder / MODULES}: embeddings are computed without {', '.join(others)}")
    return fields


def _read_modules(path: Path) -> list[dict[str, Any]]:
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        return [{"type": str(module["type"]), "path": str(module["path"])} for module in modules]
    except (ValueError, TypeError, KeyError) as error:
        raise ConversionError(f"{path} is not a list of modules: {error!r}") from None


def _read_pooling(path: Path, fields: Mapping[str, str]) -> dict[str, str]:
    settings = read_json(path)
    names = {field: pooling for pooling, field in POOLING_FIELDS.items()}
    modes = [names.get(name, name) for name in settings if _is_mode(name) and settings[name]]
    modes = settings.get("pooling_mode", modes or "mean")
    pooling = modes[0] if isinstance(modes, list) and len(modes) == 1 else modes
    if not isinstance(pooling, str) or pooling not in POOLING_FIELDS:
        warn(f"{path}: pooling {pooling!r} is not supported: embeddings are pooled by 'mean'")
        return {}
    has_prompt = any(fields.get(f"{kind}_prompt") for kind in KINDS)
    if pooling in ("mean", "weightedmean") and settings.get("include_prompt", True) and has_prompt:
        warn(f"{path}: the model pools its prompts, too: pass embed_instruction=True to embed")
    return {"pooling": pooling}


def _is_mode(name: str) -> bool:
    return name.startswith("pooling_mode_")
