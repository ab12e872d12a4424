"""The worker processes of `prepare`: each turns pieces of a dataset into shards of token ids.

Workers load neither TensorFlow nor JAX.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from grit_jax.prepare.files import DataFiles
from grit_jax.prepare.writing import Shard, write_shard
from grit_jax.text.columns import RowReader
from grit_jax.text.examples import Example, RejectedExample, TextOptions
from grit_jax.text.formats import Preprocess
from grit_jax.text.jsonl import Block
from grit_jax.text.kinds import TEXT_KINDS, TextKind
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
class RowsWorkItem(WorkItem):
    """Rows of a file."""

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
      files: its files, which assign rows to splits; None if it is not read from files.
    """

    kind: str
    files: DataFiles | None


@dataclasses.dataclass
class SplitResult:
    """The result of a piece for one split.

    Attributes:
      shard: the shard written, or None without examples.
      rejected: number ("line") and "reason" of each line that could not be used, and the details
        of the reason.
      left_out: number of lines that `preprocess` skipped.
      forms: number of examples by what they are called (`TextKind.form`).
      notes: number of lines by note (`TextKind.notes`).
      unread_fields: number of lines by a field that they have and that is not read.
      instructions: the different instructions of each stream of texts to embed.
    """

    shard: Shard | None = None
    rejected: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    left_out: int = 0
    forms: Counter[str] = dataclasses.field(default_factory=Counter)
    notes: Counter[str] = dataclasses.field(default_factory=Counter)
    unread_fields: Counter[str] = dataclasses.field(default_factory=Counter)
    instructions: dict[str, list[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Worker:
    """The state of a worker process."""

    tokenizer: Tokenizer
    options: TextOptions
    plans: Mapping[str, WorkerPlan]
    folder: Path


_worker: _Worker


def start_worker(settings: Path, folder: Path) -> None:
    """Initializes a worker process.

    Args:
      settings: a file with the names and contents of the tokenizer's files, how texts are
        tokenized, and the WorkerPlan of each dataset by name, pickled with cloudpickle.
      folder: where to write shards.
    """
    global _worker
    # The parent handles Ctrl-C. Without a parent, the worker exits.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    tokenizer, options, plans = cloudpickle.loads(settings.read_bytes())
    _worker = _Worker(Tokenizer.of_files(tokenizer), options, plans, folder)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def tokenize(item: WorkItem) -> dict[str, SplitResult]:
    """Tokenizes a piece, writes one shard per split, and returns the results by split."""
    plan = _worker.plans[item.dataset]
    kind = TEXT_KINDS[plan.kind]
    read = RowReader(plan.files.columns if plan.files else None)
    results: dict[str, SplitResult] = defaultdict(SplitResult)
    examples: dict[str, list[Example]] = defaultdict(list)
    for number, split, parse in _lines(item, plan):
        try:
            raw = _raw(plan, parse)
            if raw is None:
                results[split].left_out += 1
                continue
            line, columns = read(raw)
            canonical = kind.to_canonical(line)
            example = kind.tokenize(_worker.tokenizer, canonical, _worker.options)
        except RejectedExample as reason:
            # A reject counts against the whole file: few of its lines may be held out.
            rejected = {"line": number, "reason": str(reason), **reason.details}
            results[item.split].rejected.append(rejected)
            continue
        examples[split].append(example)
        results[split].forms[kind.form(canonical)] += 1
        results[split].notes.update(kind.notes(line, canonical))
        results[split].notes.update({text.note for text in example.texts if text.note})
        unread = (raw.keys() - columns) | (line.keys() & raw.keys()) - set(kind.fields)
        results[split].unread_fields.update(unread)
    for split, split_examples in examples.items():
        folder = _worker.folder / item.dataset / split
        results[split].shard = write_shard(folder, item.number, split_examples)
        results[split].instructions = _instructions(kind, split_examples)
    return dict(results)


def _instructions(kind: TextKind, examples: Sequence[Example]) -> dict[str, list[str]]:
    """Returns the different instructions of each stream, in order."""
    found: dict[str, dict[str, None]] = {}
    for example in examples:
        for stream, texts in kind.streams.items():
            for text in example.texts[texts]:
                if text.instruction is not None:
                    found.setdefault(stream, {})[text.instruction] = None
    return {stream: list(instructions) for stream, instructions in found.items()}


def _lines(
    item: WorkItem, plan: WorkerPlan
) -> Iterator[tuple[int, str, Callable[[], dict[str, Any]]]]:
    """Yields the number of each line or example, its split, and a function that parses it."""
    if isinstance(item, ExamplesWorkItem):
        for number, raw in enumerate(item.examples, item.first):
            yield number, item.split, functools.partial(_decode, raw)
    elif isinstance(item, RowsWorkItem) and plan.files is not None:
        for number, content, parse in item.block.rows():
            yield number, plan.files.split_of(item.split, content), parse


def _raw(plan: WorkerPlan, parse: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    raw = parse()
    if plan.files is None or plan.files.preprocess is None:
        return raw
    return _preprocessed(plan.files.preprocess, raw)


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
