"""The settings of a LoRA adapter in PEFT's format, `adapter_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from pathlib import Path
import re
from typing import Any

from grit_jax.conversion.safetensors_folder import ADAPTER_CONFIG, read_json
from grit_jax.conversion.stored_model import ConversionError

# Fields that are read, that the adapter's tensors show as well, or that matter only in training.
KNOWN_FIELDS = frozenset(
    """
    base_model_name_or_path revision peft_type task_type r lora_alpha use_rslora rank_pattern
    alpha_pattern init_lora_weights

    target_modules target_parameters exclude_modules layers_to_transform layers_pattern bias
    modules_to_save

    auto_mapping corda_config ensure_weight_tying eva_config inference_mode loftq_config
    lora_dropout lora_ga_config megatron_config megatron_core peft_version qalora_group_size
    runtime_config
    """.split()  # noqa: SIM905  It reads better.
)
# Initializations that leave the base's weights as they are.
INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftSettings:
    """What adapter_config.json says about an adapter.

    Attributes:
      base: name or folder of the base model.
      revision: revision of the base model on the Hub; None for the newest.
      rank: rank of the updates.
      alpha: updates are scaled by alpha / rank.
      use_rslora: whether they are scaled by alpha / sqrt(rank) instead.
      rank_patterns: other ranks, by regular expressions for the ends of modules' names.
      alpha_patterns: other values of alpha, in the same way.
    """

    base: str
    revision: str | None
    rank: int
    alpha: float
    use_rslora: bool
    rank_patterns: Mapping[str, int]
    alpha_patterns: Mapping[str, float]

    @classmethod
    def read(cls, folder: Path) -> PeftSettings:
        """Returns the settings in a folder.

        Raises:
          ConversionError: the file is damaged, or a field has a value that is not supported.
        """
        path = folder / ADAPTER_CONFIG
        fields = read_json(path)
        _check(path, fields)
        try:
            return cls(
                base=str(fields.get("base_model_name_or_path") or ""),
                revision=fields.get("revision"),
                rank=int(fields["r"]),
                alpha=float(fields["lora_alpha"]),
                use_rslora=bool(fields.get("use_rslora")),
                rank_patterns={k: int(v) for k, v in (fields.get("rank_pattern") or {}).items()},
                alpha_patterns={
                    k: float(v) for k, v in (fields.get("alpha_pattern") or {}).items()
                },
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConversionError(f"{path} does not describe a LoRA adapter: {error!r}") from None

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module's update."""
        return self.rank_patterns.get(_key(self.rank_patterns, module), self.rank)

    def scale(self, module: str) -> float:
        """Returns the factor of a module's update."""
        rank = self.rank_of(module)
        alpha = self.alpha_patterns.get(_key(self.alpha_patterns, module), self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _key(patterns: Mapping[str, Any], module: str) -> str:
    """Returns the first pattern that matches the module's name or a part after a dot of it."""
    matching = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, module)


def _check(path: Path, fields: Mapping[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise ConversionError(
            f"{path}: peft_type={fields.get('peft_type')!r} is not supported, only 'LORA': merge "
            "the adapter with merge_and_unload(), and save the model with save_pretrained()"
        )
    start = fields.get("init_lora_weights", True)
    if not any(start is value or start == value for value in INITIALIZATIONS):
        raise ConversionError(
            f"{path}: init_lora_weights={start!r} has changed the base model's weights: save the "
            "adapter with path_initial_model_for_weight_conversion of PEFT's save_pretrained()"
        )
    for name, value in fields.items():
        if value and name not in KNOWN_FIELDS:
            raise ConversionError(
                f"{path}: {name}={value!r} is not supported: merge the adapter with "
                "merge_and_unload(), and save the model with save_pretrained()"
            )
