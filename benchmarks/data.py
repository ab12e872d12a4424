"""How full rows are and how fast batches are read: python benchmarks/data.py [--prepared FOLDER]

Makes a corpus of random tokens with the original's limits (256, 2048 and 2048 tokens) and
long-tailed lengths, and measures on it and on the prepared sample (`make demo` prepares it): the
share of places in the rows that hold a token, and real tokens read and packed a second.
"""

import argparse
from collections.abc import Iterator
import dataclasses
from pathlib import Path
import tempfile
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from grit_jax.data.batch_plan import Plan
from grit_jax.data.batches import Batches, read_ahead
from grit_jax.data.manifest import PreparedDataset
from grit_jax.data.sampling import MixedSampler, SingleDatasetSampler
from grit_jax.data.shapes import RowLimits
from grit_jax.prepare.writing import write_dataset, write_shard
from grit_jax.text.examples import ChatExample, EmbeddingExample, Text

STREAMS = {"query": "queries", "passage": "passages", "chat": "chats"}
# Median and spread (of the logarithm) of tokens in queries and in passages, and rates.
PAIRS = {"pairs_short": (18, 0.5, 90, 0.6, 0.5), "pairs_long": (45, 0.8, 260, 0.9, 0.5)}
CHATS = {"chats_short": (250, 0.9, 0.6), "chats_long": (900, 0.8, 0.4)}


@dataclasses.dataclass(frozen=True)
class Case:
    """Batches to measure, of a corpus."""

    title: str
    folder: Path
    pairs: dict[str, float]
    chats: dict[str, float]
    batch_sizes: tuple[int, int]
    limits: RowLimits
    homogeneous: bool

    def batches(self) -> Batches:
        """Returns the batches."""

        def datasets(rates: dict[str, float]) -> dict[PreparedDataset, float]:
            return {PreparedDataset(self.folder, n, "train"): rate for n, rate in rates.items()}

        embedding = SingleDatasetSampler if self.homogeneous else MixedSampler
        streams = {
            "embedding": embedding(datasets(self.pairs), self.batch_sizes[0], 2, seed=0),
            "generative": MixedSampler(datasets(self.chats), self.batch_sizes[1], 0, seed=1),
        }
        return Batches(streams, self.limits)


def main() -> None:
    """Makes the corpus, and prints a table of packing and a table of throughput."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prepared", type=Path, default="data/sample", help="the prepared sample")
    parser.add_argument(
        "--examples", type=int, default=30_000, help="of each dataset of the corpus"
    )
    parser.add_argument("--steps", type=int, default=300, help="to plan, on the sample")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_corpus(Path(folder), options.examples)
        cases = list(make_cases(options.prepared, Path(folder)))
        console = Console()
        console.print(packing_table(cases, options.steps))
        console.print(throughput_table([cases[0], cases[2]]))


def make_cases(sample: Path, corpus: Path) -> Iterator[Case]:
    """Yields the sample as gritlm_tiny.py trains on it, and the corpus as gritlm_7b.py would."""
    tiny = {"longest": dict.fromkeys(STREAMS, 512), "length_multiple": 8}
    large = {"longest": {"query": 512, "passage": 2560, "chat": 2560}, "length_multiple": 128}
    pairs = {"wordnet_senses": 0.8, "jargon_entries": 0.2}
    chats = {"wordnet_chat": 0.75, "jargon_chat": 0.25}
    for one, words in ((True, "one dataset a step"), (False, "datasets mixed")):
        limits = RowLimits(**tiny, count_multiple=1)
        yield Case(f"sample, {words}", sample, pairs, chats, (128, 8), limits, one)
    pairs = {name: values[-1] for name, values in PAIRS.items()}
    chats = {name: values[-1] for name, values in CHATS.items()}
    for one, words in ((True, "one dataset a step"), (False, "datasets mixed")):
        limits = RowLimits(**large, count_multiple=8)
        yield Case(f"long tails, {words}", corpus, pairs, chats, (2048, 256), limits, one)


def make_corpus(folder: Path, count: int) -> None:
    """Writes datasets of random tokens with long-tailed lengths."""
    random = np.random.default_rng(0)

    def texts(median: float, spread: float, longest: int, count: int) -> list[Text]:
        lengths = random.lognormal(np.log(median), spread, count).astype(int).clip(4, longest)
        tokens = random.integers(3, 32_000, lengths.sum()).astype(np.int32)
        places = np.cumsum(lengths)[:-1]
        return [Text(own, np.arange(len(own)) > 1) for own in np.split(tokens, places)]

    for name, (query, query_spread, passage, passage_spread, _) in PAIRS.items():
        queries = texts(query, query_spread, 256, count)
        passages = iter(texts(passage, passage_spread, 2048, 2 * count))
        pairs = [EmbeddingExample(q, [next(passages)], [next(passages)]) for q in queries]
        write(folder / name / "train", pairs, "embedding")
    for name, (median, spread, _) in CHATS.items():
        chats = [ChatExample(text) for text in texts(median, spread, 2048, count)]
        write(folder / name / "train", chats, "generative")


def write(folder: Path, examples: list, kind: str) -> None:
    """Writes examples as `grit-jax prepare` does."""
    tokenizer = {"name": "none", "sha256": "", "vocab_size": 32_000}
    write_dataset(folder, kind, [write_shard(folder, 0, examples)], options={}, tokenizer=tokenizer)


def packing_table(cases: list[Case], steps: int) -> Table:
    """Returns for each stream how full its rows are, beside one text a row as long as the longest.

    Args:
      cases: what to measure.
      steps: number of steps of the first cases; a tenth of it where batches are large.
    """
    table = Table(title="places that hold a token")
    for column in ("", "stream", "packed", "padded to the longest", "rows x length (steps)"):
        table.add_column(column, justify="left" if column in ("", "stream") else "right")
    for case in cases:
        batches = case.batches()
        few = steps if case.batch_sizes[0] < 1000 else max(1, steps // 5)
        plans = [batches.plans[step] for step in range(few)]
        for name, title in STREAMS.items():
            real = sum(plan.streams[name].lengths.sum() for plan in plans)
            packed = sum(plan.shape[name].places for plan in plans)
            padded = sum(padded_places(plan.streams[name].lengths) for plan in plans)
            first = name == "query"
            table.add_row(
                case.title if first else "",
                title,
                f"{real / packed:.1%}",
                f"{real / padded:.1%}",
                shapes_used(plans, name),
                end_section=name == "chat",
            )
    return table


def padded_places(lengths: np.ndarray) -> int:
    """Returns the places of one text a row, all rows as long as the longest."""
    return int(np.count_nonzero(lengths) * lengths.max())


def shapes_used(plans: list[Plan], name: str) -> str:
    """Returns the rows that plans have in a stream, each with the number of steps."""
    used: dict[tuple[int, int], int] = {}
    for plan in plans:
        rows = (plan.shape[name].count, plan.shape[name].length)
        used[rows] = used.get(rows, 0) + 1
    return ", ".join(f"{rows}x{length} ({steps})" for (rows, length), steps in used.items())


def throughput_table(cases: list[Case]) -> Table:
    """Returns the time that it takes to plan a batch, and real tokens read a second."""
    table = Table(title="batches read ahead")
    for column in ("", "threads", "milliseconds to plan", "tokens a second"):
        table.add_column(column, justify="right" if column else "left")
    for case in cases:
        steps = range(1000, 1024 if case.batch_sizes[0] > 1000 else 1300)
        for threads in (1, 2, 4):
            plans = case.batches().plans
            began = time.perf_counter()
            for step in steps:
                plans[step]
            plan_seconds = (time.perf_counter() - began) / len(steps)
            batches = case.batches()
            began = time.perf_counter()
            coming = read_ahead(batches, steps.start, steps.stop, threads)
            tokens = sum(int(batch.num_tokens) for batch in coming)
            speed = tokens / (time.perf_counter() - began)
            table.add_row(case.title, str(threads), f"{plan_seconds * 1000:.1f}", f"{speed:,.0f}")
    return table


if __name__ == "__main__":
    main()
