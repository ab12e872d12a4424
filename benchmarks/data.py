"""Measures padding and data throughput: python benchmarks/data.py [--prepared FOLDER]

Measures, on the prepared sample (`make demo` prepares it) and on a corpus of random tokens with
long-tailed lengths (at most 256, 2048 and 2048 tokens, as in the paper): the fraction of each row
that is not padding, and the tokens read and packed per second, without padding.
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

from grit_jax.data.batch_plan import BatchPlan
from grit_jax.data.batches import Batches, read_ahead
from grit_jax.data.manifest import PreparedDataset
from grit_jax.data.sampling import MixedSampler, SingleDatasetSampler
from grit_jax.data.shapes import RowLimits
from grit_jax.prepare.writing import write_dataset, write_shard
from grit_jax.text.examples import ChatExample, EmbeddingExample, Text
from grit_jax.text.kinds import STREAMS

# Median and spread (of the logarithm) of the tokens of queries and of passages, and the rate.
PAIRS = {"pairs_short": (18, 0.5, 90, 0.6, 0.5), "pairs_long": (45, 0.8, 260, 0.9, 0.5)}
# The same, of chats.
CHATS = {"chats_short": (250, 0.9, 0.6), "chats_long": (900, 0.8, 0.4)}


@dataclasses.dataclass(frozen=True)
class Case:
    """Batches to measure."""

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
        samplers = {
            "embedding": embedding(datasets(self.pairs), self.batch_sizes[0], 2, seed=0),
            "generative": MixedSampler(datasets(self.chats), self.batch_sizes[1], 0, seed=1),
        }
        return Batches(samplers, self.limits)


def main() -> None:
    """Writes the corpus, and prints a table of packing and a table of throughput."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prepared", type=Path, default="data/sample", help="the prepared sample")
    parser.add_argument(
        "--examples", type=int, default=30_000, help="examples of each dataset of the corpus"
    )
    parser.add_argument("--steps", type=int, default=300, help="steps to plan, on the sample")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_corpus(Path(folder), options.examples)
        cases = list(make_cases(options.prepared, Path(folder)))
        console = Console()
        console.print(packing_table(cases, options.steps))
        console.print(throughput_table([cases[0], cases[2]]))


def make_cases(sample: Path, corpus: Path) -> Iterator[Case]:
    """Yields the sample as trained by gritlm_tiny.py, and the corpus as trained by gritlm_7b.py."""
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
        ends = np.cumsum(lengths)[:-1]
        return [Text(own, np.arange(len(own)) > 1) for own in np.split(tokens, ends)]

    for name, (query, query_spread, passage, passage_spread, _) in PAIRS.items():
        queries = texts(query, query_spread, 256, count)
        passages = iter(texts(passage, passage_spread, 2048, 2 * count))
        pairs = [EmbeddingExample(q, [next(passages)], [next(passages)]) for q in queries]
        write(folder / name / "train", pairs, "embedding")
    for name, (median, spread, _) in CHATS.items():
        chats = [ChatExample(text) for text in texts(median, spread, 2048, count)]
        write(folder / name / "train", chats, "generative")


def write(folder: Path, examples: list, kind: str) -> None:
    """Writes examples in the format of `grit-jax prepare`."""
    tokenizer = {"name": "none", "sha256": "", "vocab_size": 32_000}
    write_dataset(folder, kind, [write_shard(folder, 0, examples)], options={}, tokenizer=tokenizer)


def packing_table(cases: list[Case], steps: int) -> Table:
    """Returns a table of the fraction of each stream's rows that is not padding.

    It is compared with rows of one text, padded to the longest text of the step.

    Args:
      cases: what to measure.
      steps: number of steps per case; a fifth of it if batches are large.
    """
    table = Table(title="fraction of rows that is not padding")
    for column in ("", "stream", "packed", "padded to the longest", "rows x length (steps)"):
        table.add_column(column, justify="left" if column in ("", "stream") else "right")
    for case in cases:
        batches = case.batches()
        few = steps if case.batch_sizes[0] < 1000 else max(1, steps // 5)
        plans = [batches.plans[step] for step in range(few)]
        for name in STREAMS:
            real = sum(plan.streams[name].lengths.sum() for plan in plans)
            packed = sum(plan.shape[name].capacity for plan in plans)
            padded = sum(padded_size(plan.streams[name].lengths) for plan in plans)
            table.add_row(
                case.title if name == STREAMS[0] else "",
                name,
                f"{real / packed:.1%}",
                f"{real / padded:.1%}",
                shapes_used(plans, name),
                end_section=name == STREAMS[-1],
            )
    return table


def padded_size(lengths: np.ndarray) -> int:
    """Returns the tokens of rows of one text, padded to the longest text."""
    return int(np.count_nonzero(lengths) * lengths.max())


def shapes_used(plans: list[BatchPlan], name: str) -> str:
    """Returns the rows of a stream in these plans, each with its number of steps."""
    used: dict[tuple[int, int], int] = {}
    for plan in plans:
        rows = (plan.shape[name].count, plan.shape[name].length)
        used[rows] = used.get(rows, 0) + 1
    return ", ".join(f"{rows}x{length} ({steps})" for (rows, length), steps in used.items())


def throughput_table(cases: list[Case]) -> Table:
    """Returns a table of the time to plan a batch, and the tokens read per second."""
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
            ahead = read_ahead(batches, steps.start, steps.stop, threads)
            tokens = sum(int(batch.num_tokens) for batch in ahead)
            speed = tokens / (time.perf_counter() - began)
            table.add_row(case.title, str(threads), f"{plan_seconds * 1000:.1f}", f"{speed:,.0f}")
    return table


if __name__ == "__main__":
    main()
