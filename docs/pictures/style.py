"""How the pictures look: a white card, so that they can be read in light and dark themes."""

from collections.abc import Sequence
import itertools
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, MUTED, LINE, PAPER = "#1f2937", "#4b5563", "#d0d7de", "#ffffff"
BLUE, GREEN, ORANGE, GREY = "#2563eb", "#15803d", "#c2410c", "#9ca3af"
PALE = {BLUE: "#bfdbfe", GREEN: "#bbf7d0", ORANGE: "#fed7aa", GREY: "#e5e7eb"}

# The same drawing is the same file: no random names, no dates, text as text.
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
    """Returns a figure of so many inches, on a card."""
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
    """Returns a figure, and axes over all of it, in hundredths of an inch from above."""
    figure = new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100 * width), ylim=(100 * height, 0))
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, text, colour=MUTED, fill=PAPER, **options):
    """Draws a box with a text in it."""
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=6",
            facecolor=fill,
            edgecolor=colour,
        )
    )
    centre = (x + width / 2, y + height / 2)
    axes.text(*centre, text, ha="center", va="center_baseline", **options)


def arrow(axes, start, end, colour=MUTED, **options):
    """Draws an arrow."""
    options = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0} | options
    axes.add_patch(FancyArrowPatch(start, end, color=colour, linewidth=1.1, **options))


def draw_cells(axes, colours: Sequence[Sequence[str | None]]) -> None:
    """Draws a square of cells, those without a colour left empty."""
    size = len(colours)
    for line, cells in enumerate(colours):
        start = 0
        for colour, run in itertools.groupby(cells):
            length = len(list(run))
            if colour is not None:
                axes.barh(line, length, 1, left=start - 0.5, color=colour, linewidth=0)
            start += length
    lines = [place - 0.5 for place in range(1, size)]
    axes.vlines(lines, -0.5, size - 0.5, color="#e8ecf0", linewidth=0.5)
    axes.hlines(lines, -0.5, size - 0.5, color="#e8ecf0", linewidth=0.5)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xticks=[], yticks=[])
    axes.tick_params(length=0, pad=2)
    for spine in axes.spines.values():
        spine.set_color(GREY)


def save(figure: Figure, path: Path) -> None:
    """Writes the picture."""
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(path, format="svg", transparent=True, metadata=metadata)
