"""Measures RAG answers in all six cache modes: python benchmarks/rag.py [--small]

A Mistral with 124.7 M random parameters in float32 answers the paper's prompts with 16 tokens, on
the CPU. Either the document or the question has the number of tokens in the first column, the other
has 16. The time is from the text of the question to the text of the answer, search included, index
building excluded. A second table has the size of stored caches on disk, and how many answers their
format changes.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from grit_jax import GritLM
from grit_jax.models import ModelConfig, make_model
from grit_jax.rag.cache_store import FORMATS
from grit_jax.rag.index import DocumentIndex, build_index
from grit_jax.rag.pipeline import CACHE_MODES, PAPER_PROMPT, RagPipeline
from grit_jax.sharding import make_mesh
from grit_jax.text.tokenizer import Tokenizer

SIZES = [250, 500, 1000, 2000, 4000]
PAPER: dict[str, Any] = {"num_documents": 1, "prompt": PAPER_PROMPT}
SHORT, NEW_TOKENS, NUM_DOCUMENTS, TIMES = 16, 16, 4, 3
WORDS = ("time", "year", "people", "day", "hand", "part", "place", "week", "water", "room", "money")
CONFIG = ModelConfig(
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=64,
    initializer_range=0.2,
)


def main() -> None:
    """Measures, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="only texts of up to 500 tokens")
    sizes = SIZES[:2] if parser.parse_args().small else SIZES
    model = GritLM(make_model(CONFIG, 0), make_mesh(), Tokenizer(), end_tokens=[])
    words = Words(model.tokenizer)
    for long in ("document", "question"):
        table = Table(title=f"seconds to an answer, by tokens of the {long}")
        for column in (long, *CACHE_MODES, "saved by its cache"):
            table.add_column(column, justify="right")
        for size in sizes:
            lengths = {"document": SHORT, "question": SHORT} | {long: size}
            seconds = measure(model, words, lengths["document"], lengths["question"])
            plain, cached = ("document-prompt", "document-cache")
            if long == "question":
                plain, cached = ("query-prompt", "query-cache")
            saved = 1 - seconds[cached] / seconds[plain]
            table.add_row(
                f"{size:,}", *(f"{seconds[mode]:.2f}" for mode in CACHE_MODES), f"{saved:.0%}"
            )
        Console(width=140).print(table)
    Console().print(stored_formats(model, words, sizes[0]))


class Words:
    """Makes random texts of a given number of tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._random = np.random.default_rng(0)
        self._words = [word for word in WORDS if len(tokenizer.encode(word)) == 1]

    def text(self, num_tokens: int) -> str:
        """Returns words of one token each."""
        return " ".join(self._random.choice(self._words, num_tokens))


def measure(
    model: GritLM, words: Words, document_tokens: int, question_tokens: int
) -> dict[str, float]:
    """Returns the median seconds of each cache mode, measured in turn."""
    with tempfile.TemporaryDirectory() as folder:
        documents = [{"text": words.text(document_tokens)} for _ in range(NUM_DOCUMENTS)]
        build_index(model, documents, f"{folder}/index", caches="float32")
        index = DocumentIndex(f"{folder}/index", model)
        pipelines = {mode: RagPipeline(model, index, mode, **PAPER) for mode in CACHE_MODES}
        seconds: dict[str, list[float]] = {mode: [] for mode in CACHE_MODES}
        for repeat, (mode, pipeline) in itertools.product(range(TIMES + 1), pipelines.items()):
            taken = timed(pipeline, words.text(question_tokens))
            if repeat:  # The first call compiles.
                seconds[mode].append(taken)
    return {mode: statistics.median(taken) for mode, taken in seconds.items()}


def timed(pipeline: RagPipeline, question: str) -> float:
    """Returns the seconds that an answer takes."""
    started = time.perf_counter()
    pipeline.ask(question, NEW_TOKENS)
    return time.perf_counter() - started


def stored_formats(model: GritLM, words: Words, document_tokens: int) -> Table:
    """Returns a table of the size of stored caches, and of the answers they leave unchanged."""
    documents = [{"text": words.text(document_tokens)} for _ in range(NUM_DOCUMENTS)]
    questions = [words.text(SHORT) for _ in range(8)]
    table = Table(title="stored caches")
    for column in ("format", "bytes a token", "of a 7B", "answers as in float32"):
        table.add_column(column, justify="left" if column == "format" else "right")
    expected: list[str] = []
    for cache_format in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            build_index(model, documents, f"{folder}/index", caches=cache_format)
            index = DocumentIndex(f"{folder}/index", model)
            pipeline = RagPipeline(model, index, "document-cache", **PAPER)
            answers = pipeline.ask(questions, NEW_TOKENS)
        texts = [each.answer for each in answers]
        expected = expected or texts
        same = np.mean([one == other for one, other in zip(texts, expected, strict=True)])
        sizes = (token_bytes(config, cache_format) for config in (CONFIG, SEVEN_B))
        table.add_row(cache_format, *(f"{size:,}" for size in sizes), f"{same:.0%}")
    return table


SEVEN_B = ModelConfig()


def token_bytes(config: ModelConfig, cache_format: str) -> int:
    """Returns the bytes on disk of a token's keys and values, with the scales of int8."""
    head_bytes = {"float32": 4 * config.head_dim, "bfloat16": 2 * config.head_dim}
    head_bytes["int8"] = config.head_dim + 2
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_bytes[cache_format]


if __name__ == "__main__":
    main()
