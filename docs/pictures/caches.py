"""Draws caches.svg: a question read causally on top of a cached document."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from style import BLUE, INK, MUTED, ORANGE, PALE, draw_cells, new_figure, save

from grit_jax.models import KVCache
from grit_jax.models.attention import AttentionMask

DOCUMENT, QUESTION, ANSWER = 14, 6, 5


def main(path: Path) -> None:
    """Draws the picture."""
    document, cache = read(empty_cache(), DOCUMENT, is_causal=False)
    rest, cache = read(cache, QUESTION + ANSWER, is_causal=True)
    figure = new_figure(7.6, 5.0)
    axes = figure.add_axes((0.23, 0.05, 0.57, 0.57 * 7.6 / 5.0))
    draw(axes, np.concatenate([document, rest]))
    save(figure, path)


def empty_cache() -> KVCache:
    """Returns a cache with a slot for each token; keys and values do not matter here."""
    num_slots = DOCUMENT + QUESTION + ANSWER
    nothing = jnp.zeros((1, 1, num_slots, 1, 1))
    slots = jnp.zeros((1, num_slots), jnp.int32)
    return KVCache(nothing, nothing, slots, slots, jnp.zeros((), jnp.int32))


def read(cache: KVCache, num_tokens: int, *, is_causal: bool) -> tuple[np.ndarray, KVCache]:
    """Returns which slots the next tokens see, and the cache with them in it."""
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
    """Draws which slot of the cache each token sees."""
    size = len(mask)
    own = [BLUE] * DOCUMENT + [ORANGE] * (QUESTION + ANSWER)
    # Of what is read later, the document's slots are those that were there already.
    colours = [
        [
            None if not seen else PALE[own[query]] if key < DOCUMENT <= query else own[query]
            for key, seen in enumerate(line)
        ]
        for query, line in enumerate(mask)
    ]
    draw_cells(axes, colours)
    axes.set_title(
        "slots of the cache: keys and values, in the order they were read", size=8.5, color=MUTED
    )
    parts = {
        "document, embedded:\nread bidirectionally": (0, DOCUMENT, BLUE),
        "question,\nread causally": (DOCUMENT, DOCUMENT + QUESTION, ORANGE),
        "answer": (DOCUMENT + QUESTION, size, ORANGE),
    }
    for name, (first, last, colour) in parts.items():
        middle = (first + last) / 2 - 0.5
        axes.text(-1.3, middle, name, ha="right", va="center", size=8.5, color=INK)
        axes.plot([-0.9, -0.9], [first - 0.3, last - 0.7], color=colour, lw=2, clip_on=False)
    axes.text(size, (DOCUMENT - 1) / 2, "kept in the index", va="center", size=8.5, color=MUTED)
    axes.text(
        size,
        (DOCUMENT + size - 1) / 2,
        "read when\nsomebody asks",
        va="center",
        size=8.5,
        color=MUTED,
    )
