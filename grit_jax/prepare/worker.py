"""The worker processes of `prepare`: each turns pieces of a dataset into shards of token ids.

Workers load neither TensorFlow nor JAX.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import multiprocessing
from multiprocessing.connection import wait
import os
from pathlib import Path
import signal
import threading
from typing import Any

import cloudpickle

from grit_jax.prepare.writing import Shard, write_shard
from grit_jax.text.examples import Example, RejectedExample, TextOptions
from grit_jax.text.formats import Preprocess
from grit_jax.text.jsonl import Block, JsonlFiles, parse_line
from grit_jax.text.kinds import TEXT_KINDS
from grit_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class WorkItem:
    """A piece of a dataset for one worker.

    Attributes:
      dataset: name of the dataset.
      split: the split that the piece was read from.
      number: index of the piece within the dataset; numbers its shards.
      file: name of the file that the piece was read from, for reports.
    """

    dataset: str
    split: str
    number: int
    file: str


@dataclasses.dataclass(frozen=True)
class LinesWorkItem(WorkItem):
    """Lines of a JSONL file."""

    block: Block


@dataclasses.dataclass(frozen=True)
class ExamplesWorkItem(WorkItem):
    """Examples of a seqio source, numbered from `first`."""

    first: int
    examples: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class WorkerPlan:
    """How a worker processes the pieces of a dataset.

    Attributes:
      kind: name of its kind of text.
      files: its files, which assign lines to splits; None if it is not read from lines.
    """

    kind: str
    files: JsonlFiles | None


@dataclasses.dataclass
class SplitResult:
    """The result of a piece for one split.

    Attributes:
      shard: the shard written, or None without examples.
      rejected: line number and reason of each line that could not be used.
      left_out: number of lines that `preprocess` skipped.
    """

    shard: Shard | None = None
    rejected: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    left_out: int = 0


@dataclasses.dataclass(frozen=True)
class _Worker:
    """The state of a worker process."""

    tokenizer: Tokenizer
    options: TextOptions
    plans: Mapping[str, WorkerPlan]
    folder: Path


_worker: _Worker


def start_worker(
    tokenizer: Mapping[str, bytes], options: TextOptions, pickled_plans: bytes, folder: Path
) -> None:
    """Initializes a worker process.

    Args:
      tokenizer: names and contents of the tokenizer's files.
      options: how texts are tokenized.
      pickled_plans: the WorkerPlan of each dataset by name, pickled with cloudpickle.
      folder: where to write shards.
    """
    global _worker
    # The parent handles Ctrl-C. Without a parent, the worker exits.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker = _Worker(
        Tokenizer.of_files(tokenizer), options, cloudpickle.loads(pickled_plans), folder
    )


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def tokenize(item: WorkItem) -> dict[str, SplitResult]:
    """Tokenizes a piece, writes one shard per split, and returns the results by split."""
    plan = _worker.plans[item.dataset]
    results: dict[str, SplitResult] = defaultdict(SplitResult)
    examples: dict[str, list[Example]] = defaultdict(list)
    for number, split, parse in _lines(item, plan):
        try:
            example = _example(plan, parse)
        except RejectedExample as reason:
            # A reject counts against the whole file: few of its lines may be held out.
            results[item.split].rejected.append((number, str(reason)))
            continue
        if example is None:
            results[split].left_out += 1
        else:
            examples[split].append(example)
    for split, split_examples in examples.items():
        folder = _worker.folder / item.dataset / split
        results[split].shard = write_shard(folder, item.number, split_examples)
    return dict(results)


def _lines(
    item: WorkItem, plan: WorkerPlan
) -> Iterator[tuple[int, str, Callable[[], dict[str, Any]]]]:
    """Yields the number of each line or example, its split, and a function that parses it."""
    if isinstance(item, ExamplesWorkItem):
        for number, raw in enumerate(item.examples, item.first):
            yield number, item.split, functools.partial(_decode, raw)
    elif isinstance(item, LinesWorkItem) and plan.files is not None:
        for number, line in item.block.lines():
            yield number, plan.files.split_of(item.split, line), functools.partial(parse_line, line)


def _example(plan: WorkerPlan, parse: Callable[[], dict[str, Any]]) -> Example | None:
    raw = parse()
    if plan.files is not None and plan.files.preprocess is not None:
        raw = _preprocessed(plan.files.preprocess, raw)
        if raw is None:
            return None
    kind = TEXT_KINDS[plan.kind]
    return kind.tokenize(_worker.tokenizer, kind.to_canonical(raw), _worker.options)


def _preprocessed(preprocess: Preprocess, raw: dict[str, Any]) -> dict[str, Any] | None:
    try:
        result = preprocess(raw)
    except RejectedExample:
        raise
    except Exception as error:  # An error in the user's function rejects the line.
        raise RejectedExample(f"preprocess raised {type(error).__name__}") from None
    if result is not None and not isinstance(result, dict):
        raise RejectedExample(f"preprocess returned a {type(result).__name__}")
    return result


def _decode(raw: Any) -> Any:
    """Returns `raw` with TensorFlow's bytes decoded to strings."""
    if isinstance(raw, dict):
        return {name: _decode(value) for name, value in raw.items()}
    if isinstance(raw, list):
        return [_decode(value) for value in raw]
    try:
        return raw.decode() if isinstance(raw, bytes) else raw
    except UnicodeDecodeError:
        raise RejectedExample("invalid UTF-8") from None
