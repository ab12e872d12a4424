"""Measures the time of answers in every cache mode: python benchmarks/rag.py [--small]

A Mistral with 124.7 M random float32 parameters answers with 16 tokens on this machine's CPU.
Question or document has the number of tokens in the first column, the other one 16. The time is
from question to answer, with search; building the index is not included. Then prints the size of
stored caches, and how many answers they change.
"""

import argparse
import itertools
import statistics
import tempfile
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from grit_jax import GritLM
from grit_jax.models import ModelConfig, make_model
from grit_jax.rag.cache_store import FORMATS
from grit_jax.rag.index import DocumentIndex, build_index
from grit_jax.rag.pipeline import CACHE_MODES, RagPipeline
from grit_jax.sharding import make_mesh
from grit_jax.text.tokenizer import Tokenizer

SIZES = [250, 500, 1000, 2000, 4000]
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
    """Runs the benchmark and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="texts up to 500 tokens only")
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
                f"{size:,}", *(f"{seconds[way]:.2f}" for way in CACHE_MODES), f"{saved:.0%}"
            )
        Console(width=140).print(table)
    Console().print(stored_forms(model, words, sizes[0]))


class Words:
    """Generates different texts with a given number of tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._random = np.random.default_rng(0)
        self._words = [word for word in WORDS if len(tokenizer.encode(word)) == 1]

    def text(self, num_tokens: int) -> str:
        """Returns a text of one-token words."""
        return " ".join(self._random.choice(self._words, num_tokens))


def measure(
    model: GritLM, words: Words, document_tokens: int, question_tokens: int
) -> dict[str, float]:
    """Returns the median seconds of each mode; modes alternate."""
    with tempfile.TemporaryDirectory() as folder:
        documents = [{"text": words.text(document_tokens)} for _ in range(NUM_DOCUMENTS)]
        build_index(model, documents, f"{folder}/index", caches="float32")
        index = DocumentIndex(f"{folder}/index", model)
        answerers = {way: RagPipeline(model, index, way) for way in CACHE_MODES}
        seconds: dict[str, list[float]] = {way: [] for way in CACHE_MODES}
        for turn, (way, answerer) in itertools.product(range(TIMES + 1), answerers.items()):
            taken = timed(answerer, words.text(question_tokens))
            if turn:  # The first turn compiles.
                seconds[way].append(taken)
    return {way: statistics.median(taken) for way, taken in seconds.items()}


def timed(answerer: RagPipeline, question: str) -> float:
    """Returns the seconds of an answer."""
    started = time.perf_counter()
    answerer.ask(question, NEW_TOKENS)
    return time.perf_counter() - started


def stored_forms(model: GritLM, words: Words, document_tokens: int) -> Table:
    """Returns a table of the disk size of caches, and of the answers that they change."""
    documents = [{"text": words.text(document_tokens)} for _ in range(NUM_DOCUMENTS)]
    questions = [words.text(SHORT) for _ in range(8)]
    table = Table(title="stored caches")
    for column in ("stored as", "bytes per token", "7B", "same answers"):
        table.add_column(column, justify="left" if column == "form" else "right")
    expected: list[str] = []
    for form in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            build_index(model, documents, f"{folder}/index", caches=form)
            index = DocumentIndex(f"{folder}/index", model)
            answers = RagPipeline(model, index, "document-cache").ask(questions, NEW_TOKENS)
        pieces = [each.answer for each in answers]
        expected = expected or pieces
        same = np.mean([one == other for one, other in zip(pieces, expected, strict=True)])
        table.add_row(
            form, f"{token_bytes(CONFIG, form):,}", f"{token_bytes(SEVEN_B, form):,}", f"{same:.0%}"
        )
    return table


SEVEN_B = ModelConfig()


def token_bytes(config: ModelConfig, form: str) -> int:
    """Returns the bytes of a token's stored keys and values, int8 scales included."""
    of_head = {"float32": 4 * config.head_dim, "bfloat16": 2 * config.head_dim}
    of_head["int8"] = config.head_dim + 2
    return 2 * config.num_hidden_layers * config.num_key_value_heads * of_head[form]


if __name__ == "__main__":
    main()
