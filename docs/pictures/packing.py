"""Draws packing.svg: passages of the sample, one per row and packed as in training."""

import gzip
import json
from pathlib import Path

import numpy as np
from style import BLUE, GREEN, MUTED, ORANGE, PALE, new_canvas, save

from grit_jax.data.packing import plan_rows
from grit_jax.sample import SAMPLE_FOLDER
from grit_jax.text.examples import embedding_text
from grit_jax.text.tokenizer import Tokenizer

NUM_PASSAGES = 40
# In hundredths of an inch: both panels, a row, the space above the rows and between them.
WIDTH, HEIGHT, TOP, GAP = 640, 8.2, 58, 2.2
LONGEST_ROW = 224
COLORS = (BLUE, GREEN, ORANGE)


def main(path: Path) -> None:
    """Draws the picture."""
    lengths = passage_lengths()
    longest = max(lengths)
    best = min(range(longest, LONGEST_ROW + 1), key=lambda row: len(plan_rows(lengths, row)) * row)
    scale = WIDTH / (longest + best)
    figure, axes = new_canvas(7.6, 5.05)
    panels = (
        (35, "one per row", longest, [[number] for number in range(len(lengths))]),
        (85 + longest * scale, "packed", best, plan_rows(lengths, best)),
    )
    for left, title, row_length, rows in panels:
        share = sum(lengths) / (len(rows) * row_length)
        axes.text(left, TOP - 28, f"{title}: {len(rows)} rows of {row_length}", size=9)
        axes.text(left, TOP - 12, f"{share:.0%} of the positions hold a token", size=8, color=MUTED)
        for number, members in enumerate(rows):
            top = TOP + number * (HEIGHT + GAP)
            axes.barh(top, row_length * scale, HEIGHT, left=left, align="edge", color="#e5e7eb")
            draw_texts(axes, left, top, [(lengths[member], member) for member in members], scale)
    note = "each box is a passage of the Jargon File, drawn to its length; gray: padding"
    axes.text(35, 491, note, size=8, color=MUTED)
    save(figure, path)


def passage_lengths() -> list[int]:
    """Returns the token counts of passages, evenly spaced over the sample's entries."""
    with gzip.open(SAMPLE_FOLDER / "train" / "jargon_entries.jsonl.gz", "rt") as file:
        passages = [json.loads(line)["pos"][0] for line in file]
    chosen = np.linspace(0, len(passages) - 1, NUM_PASSAGES).astype(int)
    tokenizer = Tokenizer()
    return [len(embedding_text(tokenizer, *passages[number], 2048)) for number in chosen]


def draw_texts(axes, left: float, top: float, texts: list[tuple[int, int]], scale: float) -> None:
    """Draws the texts of a row, each given as (length, number)."""
    for length, number in texts:
        color, width = COLORS[number % len(COLORS)], length * scale
        options = {"color": PALE[color], "edgecolor": color, "linewidth": 0.6}
        axes.barh(top, width, HEIGHT, left=left, align="edge", **options)
        left += width
