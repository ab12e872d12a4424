"""Draws joint_step.svg: three streams of texts in one pass over the weights, and the two losses."""

from pathlib import Path
import runpy

from style import BLUE, GREEN, GREY, MUTED, ORANGE, PALE, arrow, box, new_canvas, save

ROOT = Path(__file__).parents[2]
LAYERS = (("layer 1", 128), ("layer 2", 214), ("layer 32", 332))
STREAMS = {"queries": (130, BLUE), "passages": (300, GREEN), "chats": (530, ORANGE)}


def main(path: Path) -> None:
    """Draws the picture, with the numbers of GritLM 7B."""
    config = runpy.run_path(str(ROOT / "configs" / "gritlm_7b.py"))["get_config"]()
    data, loss = config.data, config.loss
    counts = {
        "queries": data.embedding_batch_size,
        "passages": data.embedding_batch_size * data.group_size,
        "chats": data.generative_batch_size,
    }
    figure, axes = new_canvas(7.6, 6.2)
    for name, (centre, colour) in STREAMS.items():
        read = "causally" if name == "chats" else "bidirectionally"
        box(
            axes,
            centre - 75,
            28,
            150,
            42,
            f"{counts[name]:,} {name}",
            colour,
            PALE[colour],
            size=9.5,
        )
        axes.text(centre, 90, f"packed, read {read}", ha="center", size=8, color=MUTED)
        arrow(axes, (centre, 97), (centre, LAYERS[0][1]), colour)
    for (name, top), next_top in zip(LAYERS, (214, 314, 410), strict=True):
        box(axes, 40, top, 590, 50, "", GREY, "#f5f7f9")
        axes.text(415, top + 25, name, ha="center", va="center_baseline", size=9.5)
        box(axes, 655, top + 5, 82, 40, "weights,\ngathered once", MUTED, size=7.5)
        arrow(axes, (655, top + 25), (630, top + 25))
        for centre, colour in STREAMS.values():
            arrow(axes, (centre, top + 50), (centre, next_top), colour)
            axes.plot([centre, centre], [top, top + 50], color=colour, linewidth=1.1, linestyle=":")
    for centre, colour in STREAMS.values():
        axes.text(centre, 327, "...", ha="center", color=colour, size=11)
    box(
        axes,
        55,
        410,
        320,
        34,
        "mean over the tokens of each text, scaled to length 1",
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
    told = (
        f"loss = {loss.embedding_weight:g} × contrastive + {loss.generative_weight:g} × next-token"
    )
    box(axes, 170, 556, 360, 40, told, MUTED, size=9.5)
    arrow(axes, (215, 518), (260, 556), BLUE)
    arrow(axes, (530, 518), (450, 556), ORANGE)
    save(figure, path)
