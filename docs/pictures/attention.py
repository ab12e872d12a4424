"""Draws attention.svg: who sees whom in rows as training packs them."""

from pathlib import Path

import numpy as np
from style import BLUE, GREEN, GREY, INK, MUTED, PALE, draw_cells, new_figure, save

from grit_jax.data.batch import PackedTexts
from grit_jax.data.packing import pack
from grit_jax.models import Stream
from grit_jax.models.attention import AttentionMask
from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.text.examples import Text, chat_text, embedding_text, plain_text
from grit_jax.text.tokenizer import Tokenizer

PADDING = 3
COLOURS = {0: GREY, 1: BLUE, 2: GREEN}


def main(path: Path) -> None:
    """Draws the picture."""
    tokenizer = Tokenizer()
    texts = one_row(
        embedding_text(tokenizer, "Define it", "river bank", 64),
        embedding_text(tokenizer, "", "land beside water", 64),
    )
    chats = one_row(
        chat_text(tokenizer, ["Who?", "It is me."], 64), plain_text(tokenizer, "A plain text.", 64)
    )
    panels = [
        ("bbcc: all see all of their text", texts, EmbeddingSpec(attention="bbcc").stream(texts)),
        (
            "cbcc: instructions see what is before",
            texts,
            EmbeddingSpec(attention="cbcc").stream(texts),
        ),
        ("cccc: all see what is before", texts, EmbeddingSpec(attention="cccc").stream(texts)),
        ("a chat and a plain text, in all patterns", chats, as_chats(chats)),
    ]
    figure = new_figure(7.6, 7.2)
    for number, (title, row, stream) in enumerate(panels):
        left, bottom = 0.105 + 0.485 * (number % 2), 0.548 - 0.477 * (number // 2)
        axes = figure.add_axes((left, bottom, 0.375, 0.375 * 7.6 / 7.2))
        draw(axes, title, row, mask_of(stream), tokenizer)
    told = "a line is a token, and coloured where it sees that of the column"
    told += "; strong: pooled or learned; grey: padding"
    figure.text(0.5, 0.022, told, ha="center", size=8, color=MUTED)
    save(figure, path)


def one_row(*texts: Text) -> PackedTexts:
    """Returns texts packed into one row, with some padding."""
    length = sum(map(len, texts)) + PADDING
    return pack(texts, [list(range(len(texts)))], 1, length)


def as_chats(row: PackedTexts) -> Stream:
    """Returns chats as the joint step reads them."""
    return Stream(row.tokens, row.segment_ids, row.positions, is_causal=True)


def mask_of(stream: Stream) -> np.ndarray:
    """Returns for each token of the row, and each other one, whether the one sees the other."""
    mask = AttentionMask(
        stream.segment_ids, stream.positions, stream.is_causal, stream.causal_query_mask
    )
    return np.asarray(mask.as_array())[0]


def draw(axes, title: str, row: PackedTexts, mask: np.ndarray, tokenizer: Tokenizer) -> None:
    """Draws a mask: a line for each token, coloured where it sees the token of the column."""
    segments = [int(segment) for segment in row.segment_ids[0]]
    colours = [
        COLOURS[segment] if counts else PALE[COLOURS[segment]]
        for segment, counts in zip(segments, row.mask[0], strict=True)
    ]
    draw_cells(
        axes,
        [[colour if s else None for s in sees] for colour, sees in zip(colours, mask, strict=True)],
    )
    axes.set_title(title, size=9, color=INK)
    names = [
        piece(tokenizer, *token) for token in zip(row.tokens[0].tolist(), segments, strict=True)
    ]
    axes.set_yticks(range(len(names)), names, size=5, color=MUTED, family="monospace")


def piece(tokenizer: Tokenizer, token: int, segment: int) -> str:
    """Returns a token as it is shown."""
    if segment == 0:
        return "-"
    special = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    text = special.get(token) or tokenizer.decode([token])
    return text.replace("\n", "\\n") or "\\n"
