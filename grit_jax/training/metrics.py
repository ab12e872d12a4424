"""What a run writes down: a JSON object a line, and a picture of them."""

from collections.abc import Mapping
import json
from typing import Any

from etils import epath
from matplotlib.figure import Figure


class MetricsFile:
    """The file `metrics.jsonl` of a run; steps only grow in it.

    `has_held_out` tells whether it began with measures on held-out data from before.

    Args:
      path: of the file.
      from_step: lines of later steps are dropped: a run that was stopped makes them again.
    """

    def __init__(self, path: epath.Path, from_step: int):
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= from_step]
        self.has_held_out = any(name.startswith("held_out/") for line in kept for name in line)
        incomplete = path.with_name(f".incomplete-{path.name}")
        incomplete.write_text("".join(json.dumps(line) + "\n" for line in kept))
        incomplete.replace(path)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a line with `step` and the values."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
    """Returns the lines of a `metrics.jsonl`, none if there is no such file.

    A last line that was cut off when the machine stopped is left out.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw_curves(lines: list[dict[str, Any]], path: epath.Path) -> None:
    """Draws the losses and the held-out measures of a run over its steps."""
    losses = ("embedding_loss", "generative_loss")
    panels = [name for name in losses if any(name in line for line in lines)]
    panels += sorted({name for line in lines for name in line if name.startswith("held_out/")})
    if not panels:
        return
    columns = 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, name in zip(axes, panels, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else None)
        axis.set_title(name.replace("held_out/", "held-out ").replace("_", " "), fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
