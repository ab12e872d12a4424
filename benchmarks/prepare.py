"""Speed of tokenizing a dataset: python benchmarks/prepare.py [--megabytes N] [--runs N]

Compares `grit-jax prepare` with `datasets.map` and Hugging Face's fast tokenizer, on the same file
and with the same number of processes, in alternating runs. This needs two more packages, in any
environment:

    pip install datasets transformers        (--datasets-python names its Python)

Both sides read a JSONL file, apply the templates, cut texts to 256 and 2048 tokens and write the
result for training. The time is that of the whole command without imports. The file is made of the
embedded sample: `short` has its texts, `long` has passages of nine texts each.
"""

import argparse
import gzip
import json
import os
from pathlib import Path
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from rich.console import Console
from rich.table import Table

from grit_jax.sample import SAMPLE_FOLDER
from grit_jax.text.examples import TextOptions
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.text.tokenizer_files import tokenizer_path

TEXTS = ("wordnet_senses", "jargon_entries")


def main() -> None:
    """Writes the files, runs both sides in turn, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100, help="size of each file (100)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each side (5)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--datasets-python", default=sys.executable, help="one with datasets")
    parser.add_argument("--side", choices=("ours", "datasets"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(SIDES[options.side](options.file, options.processes)))
        return
    table = Table(title=f"{options.megabytes} MB, {options.processes} processes")
    for column in ("texts", "side", "seconds", "CPU seconds", "MB/s", "speedup"):
        table.add_column(column, justify="left" if column in ("texts", "side") else "right")
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("short", "long"):
            file = make_file(Path(folder) / f"{kind}.jsonl", kind, options.megabytes * 10**6)
            add_rows(table, kind, file, options)
    Console().print(table)


def make_file(path: Path, kind: str, size: int) -> Path:
    """Writes random lines of the sample until the file has `size` bytes."""
    order = random.Random(0)
    files = [SAMPLE_FOLDER / "train" / f"{name}.jsonl.gz" for name in TEXTS]
    lines = [
        json.loads(line)
        for file in files
        for line in gzip.decompress(file.read_bytes()).splitlines()
    ]
    texts = [line["pos"][0][1] for line in lines]
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            line = order.choice(lines)
            if kind == "long":
                passages = [" ".join(order.choices(texts, k=9)) for _ in range(3)]
                line = {
                    "query": line["query"],
                    "pos": [["", passages[0]]],
                    "neg": [["", passage] for passage in passages[1:]],
                }
            file.write(json.dumps(line) + "\n")
    return path


def add_rows(table: Table, kind: str, file: Path, options: argparse.Namespace) -> None:
    """Runs both sides in turn and adds a row for each with its median times."""
    measured = {side: [] for side in SIDES}
    for _ in range(options.runs):
        for side, times in measured.items():
            python = sys.executable if side == "ours" else options.datasets_python
            command = [python, __file__, "--side", side, "--file", str(file)]
            command += ["--processes", str(options.processes)]
            environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
            finished = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment
            )
            if finished.returncode:
                raise SystemExit(finished.stderr)
            times.append(json.loads(finished.stdout.splitlines()[-1]))
    medians = {
        side: {name: statistics.median(t[name] for t in times) for name in times[0]}
        for side, times in measured.items()
    }
    for side, median in medians.items():
        table.add_row(
            kind,
            {"ours": "grit-jax prepare", "datasets": "datasets.map"}[side],
            f"{median['seconds']:.1f}",
            f"{median['cpu']:.1f}",
            f"{file.stat().st_size / 1e6 / median['seconds']:.1f}",
            f"{medians['datasets']['seconds'] / median['seconds']:.1f}",
        )


def ours(file: Path, processes: int) -> dict[str, float]:
    """Prepares the file in a temporary folder."""
    from grit_jax.prepare.prepare import prepare_mixtures

    with tempfile.TemporaryDirectory() as folder:
        with Clock() as clock:
            prepare_mixtures(
                [str(file)], [], folder, Tokenizer(), TextOptions(), processes=processes
            )
        return clock.times


def datasets_map(file: Path, processes: int) -> dict[str, float]:
    """Tokenizes the file with batched datasets.map, caching in a temporary folder."""
    import datasets
    from transformers import AutoTokenizer

    options = TextOptions()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(tokenizer_path("mistral").read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if not tokenizer.is_fast:
            raise SystemExit("transformers did not load a fast tokenizer")

        def ids(pairs, length):
            texts = [
                (f"<s><|user|>\n{instruction}\n<|embed|>\n" if instruction else "<s><|embed|>\n")
                + text
                for instruction, text in pairs
            ]
            made = tokenizer(texts, truncation=True, max_length=length, add_special_tokens=False)
            return made["input_ids"]

        def tokenize(batch):
            made = {"query": ids(batch["query"], options.query_length)}
            for name in ("pos", "neg"):
                passages = [pair for own in batch[name] for pair in own]
                flat = iter(ids(passages, options.passage_length) if passages else [])
                made[name] = [[next(flat) for _ in own] for own in batch[name]]
            return made

        with Clock() as clock:
            lines = datasets.load_dataset(
                "json", data_files=str(file), split="train", cache_dir=folder
            )
            made = lines.map(
                tokenize, batched=True, num_proc=processes, remove_columns=lines.column_names
            )
            assert len(made)
        return clock.times


class Clock:
    """Measures seconds, and CPU seconds of this process and its children."""

    def __enter__(self) -> "Clock":
        self._cpu, self._start = cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        seconds = time.perf_counter() - self._start
        self.times = {"seconds": seconds, "cpu": cpu_seconds() - self._cpu}


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


SIDES = {"ours": ours, "datasets": datasets_map}

if __name__ == "__main__":
    main()
