"""The style of the pictures: a white card, readable in light and dark themes."""

from collections.abc import Sequence
import itertools
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, MUTED, LINE, PAPER = "#1f2937", "#4b5563", "#d0d7de", "#ffffff"
BLUE, GREEN, ORANGE, GRAY = "#2563eb", "#15803d", "#c2410c", "#9ca3af"
PALE = {BLUE: "#bfdbfe", GREEN: "#bbf7d0", ORANGE: "#fed7aa", GRAY: "#e5e7eb"}

# Makes files deterministic: no random names, no dates, text as text.
mpl.rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "grit-jax",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8,
        "text.color": INK,
    }
)


def new_figure(width: float, height: float) -> Figure:
    """Returns a figure on a card; sizes are in inches."""
    figure = Figure(figsize=(width, height))
    margin = 0.03
    figure.patches.append(
        FancyBboxPatch(
            (margin / width, margin / height),
            1 - 2 * margin / width,
            1 - 2 * margin / height,
            boxstyle="round,pad=0,rounding_size=0.012",
            mutation_aspect=width / height,
            transform=figure.transFigure,
            facecolor=PAPER,
            edgecolor=LINE,
            zorder=-1,
        )
    )
    return figure


def new_canvas(width: float, height: float):
    """Returns a figure and axes that cover it, in hundredths of an inch from the top left."""
    figure = new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100 * width), ylim=(100 * height, 0))
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, text, color=MUTED, fill=PAPER, **options):
    """Draws a box with text."""
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=6",
            facecolor=fill,
            edgecolor=color,
        )
    )
    center = (x + width / 2, y + height / 2)
    axes.text(*center, text, ha="center", va="center_baseline", **options)


def arrow(axes, start, end, color=MUTED, **options):
    """Draws an arrow."""
    options = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0} | options
    axes.add_patch(FancyArrowPatch(start, end, color=color, linewidth=1.1, **options))


def draw_cells(axes, colors: Sequence[Sequence[str | None]]) -> None:
    """Draws a square grid of cells; None leaves a cell empty."""
    size = len(colors)
    for line, cells in enumerate(colors):
        start = 0
        for color, run in itertools.groupby(cells):
            length = len(list(run))
            if color is not None:
                axes.barh(line, length, 1, left=start - 0.5, color=color, linewidth=0)
            start += length
    lines = [index - 0.5 for index in range(1, size)]
    axes.vlines(lines, -0.5, size - 0.5, color="#e8ecf0", linewidth=0.5)
    axes.hlines(lines, -0.5, size - 0.5, color="#e8ecf0", linewidth=0.5)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xticks=[], yticks=[])
    axes.tick_params(length=0, pad=2)
    for spine in axes.spines.values():
        spine.set_color(GRAY)


def save(figure: Figure, path: Path) -> None:
    """Writes the picture."""
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(path, format="svg", transparent=True, metadata=metadata)
