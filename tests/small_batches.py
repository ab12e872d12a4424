"""Batches of a few short texts, for steps of very small models."""

import dataclasses

import numpy as np

from grit_jax.data.batch import Batch, ChatBatch, EmbeddingBatch
from grit_jax.data.packing import pack, plan_rows
from grit_jax.text.examples import Text

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 1.0,
}
ROW_LENGTH = 24


def random_texts(generator, count, unpooled):
    texts = []
    for _ in range(count):
        # Few lengths: the reference step is compiled for each.
        length = int(generator.choice([4, 7, 11]))
        tokens = generator.integers(3, SIZES["vocab_size"], length).astype(np.int32)
        texts.append(Text(tokens, np.arange(length) >= unpooled))
    return texts


def make_batch(seed, shards=1):
    """Returns a packed batch of 8 queries with 2 passages each and 8 chats, and its texts.

    Query 5 is a copy of query 0.
    """
    generator = np.random.default_rng(seed)
    texts = {
        "queries": random_texts(generator, 8, 2),
        "passages": random_texts(generator, 16, 1),
        "chats": random_texts(generator, 8, 3),
    }
    texts["queries"][5] = texts["queries"][0]

    def packed(name):
        rows = plan_rows([len(text) for text in texts[name]], ROW_LENGTH)
        num_rows = -(-len(rows) // shards) * shards
        return pack(texts[name], rows, num_rows, ROW_LENGTH)

    embedding = EmbeddingBatch(
        packed("queries"),
        packed("passages"),
        positives=np.arange(0, 16, 2, dtype=np.int32),
        passage_ids=np.arange(16, dtype=np.int32),
        query_ids=np.array([0, 1, 2, 3, 4, 0, 6, 7], np.int32),
    )
    return Batch({"embedding": embedding, "generative": ChatBatch(packed("chats"))}), texts


def only(batch, kind):
    """Returns a batch with the texts of one kind only."""
    return dataclasses.replace(batch, parts={kind: batch.parts[kind]})
