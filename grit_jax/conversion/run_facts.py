"""What a training run says about the model of one of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import dataclasses
import json
from typing import Any

from grit_jax.conversion.orbax_model import DESCRIPTION, read_item
from grit_jax.conversion.stored_model import ConversionError, Folder, StoredModel

HELD_OUT = "held_out/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run knows about a checkpoint.

    Attributes:
      step: the checkpoint's step.
      config: fields of the configuration, by names such as "optimizer.learning_rate"; empty if the
        checkpoint was moved away from its run.
      data: for each kind of text the batch size and the datasets, as `describe_sampler` returns
        them.
      held_out: the held-out metrics at this step, by names such as "perplexity".
    """

    step: int
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    held_out: Mapping[str, float]

    @classmethod
    def of(cls, model: StoredModel) -> RunFacts | None:
        """Returns the facts about a checkpoint of a run, None for any other model."""
        folder = model.folder
        if not folder.name.isdigit() or folder.parent.name != "checkpoints":
            return None
        try:
            data = read_item(folder, DESCRIPTION).get("data", {})
        except ConversionError:  # It was not saved by a run.
            return None
        step, workdir = int(folder.name), folder.parent.parent
        return cls(
            step=step,
            config=_read_config(workdir),
            data={kind: fields for kind, fields in data.items() if isinstance(fields, dict)},
            held_out=_read_held_out(workdir, step),
        )


def _read_config(workdir: Folder) -> dict[str, Any]:
    try:
        fields = json.loads((workdir / "config.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    sections = {name: value for name, value in fields.items() if isinstance(value, dict)}
    flat = {f"{name}.{key}": v for name, section in sections.items() for key, v in section.items()}
    return {name: value for name, value in fields.items() if name not in sections} | flat


def _read_held_out(workdir: Folder, step: int) -> dict[str, float]:
    path, found = workdir / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # The machine stopped while it was written.
            values = json.loads(line)
            if values.get("step") == step:
                found |= {k: v for k, v in values.items() if k.startswith(HELD_OUT)}
    return {name.removeprefix(HELD_OUT): value for name, value in found.items()}
