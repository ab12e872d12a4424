"""Draws joint_step.svg: three streams in one pass over the weights, and the two losses."""

from pathlib import Path
import runpy

from style import BLUE, GRAY, GREEN, MUTED, ORANGE, PALE, arrow, box, new_canvas, save

ROOT = Path(__file__).parents[2]
LAYERS = (("layer 1", 128), ("layer 2", 214), ("layer 32", 332))
STREAMS = {"queries": (130, BLUE), "passages": (300, GREEN), "chats": (530, ORANGE)}


def main(path: Path) -> None:
    """Draws the picture, with the batch sizes of GritLM 7B."""
    config = runpy.run_path(str(ROOT / "configs" / "gritlm_7b.py"))["get_config"]()
    data, loss = config.data, config.loss
    counts = {
        "queries": data.embedding_batch_size,
        "passages": data.embedding_batch_size * data.group_size,
        "chats": data.generative_batch_size,
    }
    figure, axes = new_canvas(7.6, 6.2)
    for name, (center, color) in STREAMS.items():
        attention = "causal" if name == "chats" else "bidirectional"
        box(
            axes,
            center - 75,
            28,
            150,
            42,
            f"{counts[name]:,} {name}",
            color,
            PALE[color],
            size=9.5,
        )
        axes.text(center, 90, f"packed, {attention}", ha="center", size=8, color=MUTED)
        arrow(axes, (center, 97), (center, LAYERS[0][1]), color)
    for (name, top), next_top in zip(LAYERS, (214, 314, 410), strict=True):
        box(axes, 40, top, 590, 50, "", GRAY, "#f5f7f9")
        axes.text(415, top + 25, name, ha="center", va="center_baseline", size=9.5)
        box(axes, 655, top + 5, 82, 40, "weights,\ngathered once", MUTED, size=7.5)
        arrow(axes, (655, top + 25), (630, top + 25))
        for center, color in STREAMS.values():
            arrow(axes, (center, top + 50), (center, next_top), color)
            axes.plot([center, center], [top, top + 50], color=color, linewidth=1.1, linestyle=":")
    for center, color in STREAMS.values():
        axes.text(center, 327, "...", ha="center", color=color, size=11)
    box(
        axes,
        55,
        410,
        320,
        34,
        "mean over each text's tokens, L2-normalized",
        BLUE,
        size=8,
    )
    box(
        axes,
        55,
        470,
        320,
        48,
        "contrastive loss\neach query against every passage",
        BLUE,
        PALE[BLUE],
        size=8.5,
    )
    arrow(axes, (215, 444), (215, 470), BLUE)
    box(
        axes,
        430,
        410,
        200,
        108,
        "next-token loss\nof the assistant's tokens",
        ORANGE,
        PALE[ORANGE],
        size=8.5,
    )
    total = (
        f"loss = {loss.embedding_weight:g} × contrastive + {loss.generative_weight:g} × next-token"
    )
    box(axes, 170, 556, 360, 40, total, MUTED, size=9.5)
    arrow(axes, (215, 518), (260, 556), BLUE)
    arrow(axes, (530, 518), (450, 556), ORANGE)
    save(figure, path)
