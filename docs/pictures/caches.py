"""Draws caches.svg: the attention mask of a question after a cached document."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from style import BLUE, INK, MUTED, ORANGE, PALE, draw_cells, new_figure, save

from grit_jax.models import KVCache
from grit_jax.models.attention import AttentionMask

DOCUMENT, QUESTION, ANSWER = 14, 6, 5


def main(path: Path) -> None:
    """Draws the picture."""
    document, cache = extend(empty_cache(), DOCUMENT, is_causal=False)
    rest, cache = extend(cache, QUESTION + ANSWER, is_causal=True)
    figure = new_figure(7.6, 5.0)
    axes = figure.add_axes((0.23, 0.05, 0.57, 0.57 * 7.6 / 5.0))
    draw(axes, np.concatenate([document, rest]))
    save(figure, path)


def empty_cache() -> KVCache:
    """Returns a cache with one slot per token; its keys and values are not used."""
    num_slots = DOCUMENT + QUESTION + ANSWER
    keys = jnp.zeros((1, 1, num_slots, 1, 1))
    slots = jnp.zeros((1, num_slots), jnp.int32)
    return KVCache(keys, keys, slots, slots, jnp.zeros((), jnp.int32))


def extend(cache: KVCache, num_tokens: int, *, is_causal: bool) -> tuple[np.ndarray, KVCache]:
    """Returns the attention mask of the next tokens, bool [S, slots], and the updated cache."""
    positions = cache.next_positions()[:, None] + jnp.arange(num_tokens)[None]
    segment_ids = jnp.ones_like(positions)
    cache = cache.reserve(positions, segment_ids)
    mask = AttentionMask(
        segment_ids,
        positions,
        is_causal,
        key_segment_ids=cache.segment_ids,
        key_positions=cache.positions,
    )
    return np.asarray(mask.as_array())[0], cache


def draw(axes, mask: np.ndarray) -> None:
    """Draws the cache slots that each token attends to."""
    size = len(mask)
    own = [BLUE] * DOCUMENT + [ORANGE] * (QUESTION + ANSWER)
    # The question and the answer use pale cells for the document's slots.
    colors = [
        [
            None if not is_attended else PALE[own[query]] if key < DOCUMENT <= query else own[query]
            for key, is_attended in enumerate(line)
        ]
        for query, line in enumerate(mask)
    ]
    draw_cells(axes, colors)
    axes.set_title("cache slots, in order (keys and values)", size=8.5, color=MUTED)
    parts = {
        "document,\nbidirectional": (0, DOCUMENT, BLUE),
        "question,\ncausal": (DOCUMENT, DOCUMENT + QUESTION, ORANGE),
        "answer,\ncausal": (DOCUMENT + QUESTION, size, ORANGE),
    }
    for name, (first, last, color) in parts.items():
        middle = (first + last) / 2 - 0.5
        axes.text(-1.3, middle, name, ha="right", va="center", size=8.5, color=INK)
        axes.plot([-0.9, -0.9], [first - 0.3, last - 0.7], color=color, lw=2, clip_on=False)
    axes.text(size, (DOCUMENT - 1) / 2, "stored in the index", va="center", size=8.5, color=MUTED)
    axes.text(
        size,
        (DOCUMENT + size - 1) / 2,
        "computed for\neach question",
        va="center",
        size=8.5,
        color=MUTED,
    )
