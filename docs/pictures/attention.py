"""Draws attention.svg: the attention masks of packed rows."""

from pathlib import Path

import numpy as np
from style import BLUE, GRAY, GREEN, INK, MUTED, PALE, draw_cells, new_figure, save

from grit_jax.data.batch import PackedTexts
from grit_jax.data.packing import pack
from grit_jax.models import Stream
from grit_jax.models.attention import AttentionMask
from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.text.examples import Text, chat_text, embedding_text, plain_text
from grit_jax.text.tokenizer import Tokenizer

PADDING = 3
COLORS = {0: GRAY, 1: BLUE, 2: GREEN}


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
        ("bbcc: bidirectional", texts, EmbeddingSpec(attention="bbcc").stream(texts)),
        (
            "cbcc: causal instruction",
            texts,
            EmbeddingSpec(attention="cbcc").stream(texts),
        ),
        ("cccc: causal", texts, EmbeddingSpec(attention="cccc").stream(texts)),
        ("a chat and a plain text, all patterns", chats, as_chats(chats)),
    ]
    figure = new_figure(7.6, 7.2)
    for number, (title, row, stream) in enumerate(panels):
        left, bottom = 0.105 + 0.485 * (number % 2), 0.548 - 0.477 * (number // 2)
        axes = figure.add_axes((left, bottom, 0.375, 0.375 * 7.6 / 7.2))
        draw(axes, title, row, mask_of(stream), tokenizer)
    legend = "each line is a token; colored: the tokens it attends to"
    legend += "; strong: pooled or predicted; gray: padding"
    figure.text(0.5, 0.022, legend, ha="center", size=8, color=MUTED)
    save(figure, path)


def one_row(*texts: Text) -> PackedTexts:
    """Returns the texts packed into one row, with some padding."""
    length = sum(map(len, texts)) + PADDING
    return pack(texts, [list(range(len(texts)))], 1, length)


def as_chats(row: PackedTexts) -> Stream:
    """Returns chats as a stream of the joint step."""
    return Stream(row.tokens, row.segment_ids, row.positions, is_causal=True)


def mask_of(stream: Stream) -> np.ndarray:
    """Returns the attention mask of the row, bool [S, S]."""
    mask = AttentionMask(
        stream.segment_ids, stream.positions, stream.is_causal, stream.causal_query_mask
    )
    return np.asarray(mask.as_array())[0]


def draw(axes, title: str, row: PackedTexts, mask: np.ndarray, tokenizer: Tokenizer) -> None:
    """Draws a mask with one line per token."""
    segments = [int(segment) for segment in row.segment_ids[0]]
    colors = [
        COLORS[segment] if counts else PALE[COLORS[segment]]
        for segment, counts in zip(segments, row.mask[0], strict=True)
    ]
    draw_cells(
        axes,
        [[color if m else None for m in line] for color, line in zip(colors, mask, strict=True)],
    )
    axes.set_title(title, size=9, color=INK)
    names = [
        piece(tokenizer, *token) for token in zip(row.tokens[0].tolist(), segments, strict=True)
    ]
    axes.set_yticks(range(len(names)), names, size=5, color=MUTED, family="monospace")


def piece(tokenizer: Tokenizer, token: int, segment: int) -> str:
    """Returns the label of a token."""
    if segment == 0:
        return "-"
    special = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    text = special.get(token) or tokenizer.decode([token])
    return text.replace("\n", "\\n") or "\\n"
