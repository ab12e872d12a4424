"""What a worker process does: lines to examples of token ids, into one shard of each split.

Neither TensorFlow nor JAX is loaded here.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
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

from grit_jax.prepare.writing import Part, write_part
from grit_jax.text.examples import Example, RejectedExample, TextOptions
from grit_jax.text.formats import Preprocess
from grit_jax.text.jsonl import Block, JsonlFiles, parse_line
from grit_jax.text.kinds import TEXT_KINDS
from grit_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class WorkItem:
    """A piece of a Task for one worker.

    Attributes:
      task: name of the Task.
      split: its split.
      number: of the piece within the Task.
      file: the file that it is from, for reports.
    """

    task: str
    split: str
    number: int
    file: str


@dataclasses.dataclass(frozen=True)
class LinesWorkItem(WorkItem):
    """Lines of a file."""

    block: Block


@dataclasses.dataclass(frozen=True)
class ExamplesWorkItem(WorkItem):
    """Examples that come from a seqio source, the first of which has the number `first`."""

    first: int
    examples: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class TaskPlan:
    """How a Task's pieces are read: its kind, and its files if it is read from lines."""

    kind: str
    files: JsonlFiles | None


@dataclasses.dataclass
class SplitResult:
    """What became of a piece, in one split.

    Attributes:
      part: the shard, or None without an example.
      rejected: number of the line and reason, for each line of the split's files that could not
        be used.
      left_out: number of lines left out by `preprocess`.
    """

    part: Part | None = None
    rejected: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    left_out: int = 0


@dataclasses.dataclass(frozen=True)
class _Worker:
    """What a process knows of the run."""

    tokenizer: Tokenizer
    options: TextOptions
    plans: Mapping[str, TaskPlan]
    folder: Path


_worker: _Worker


def start_worker(tokenizer: str, options: TextOptions, pickled_plans: bytes, folder: Path) -> None:
    """Readies a process; `pickled_plans` are the TaskPlans by the names of their Tasks."""
    global _worker
    # Ctrl-C is the parent's affair, and without a parent there is nothing to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _worker = _Worker(Tokenizer(tokenizer), options, cloudpickle.loads(pickled_plans), folder)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def tokenise(unit: WorkItem) -> dict[str, SplitResult]:
    """Writes the shards of a piece, and returns what became of it by split."""
    plan = _worker.plans[unit.task]
    outcomes: dict[str, SplitResult] = defaultdict(SplitResult)
    examples: dict[str, list[Example]] = defaultdict(list)
    for number, split, read in _items(unit, plan):
        try:
            example = _example(plan, read)
        except RejectedExample as reason:
            # It counts among the lines of its file, of which few may be held out.
            outcomes[unit.split].rejected.append((number, str(reason)))
            continue
        if example is None:
            outcomes[split].left_out += 1
        else:
            examples[split].append(example)
    for split, own in examples.items():
        folder = _worker.folder / unit.task / split
        outcomes[split].part = write_part(folder, unit.number, own)
    return dict(outcomes)


def _items(unit: WorkItem, plan: TaskPlan) -> Iterator[tuple[int, str, Any]]:
    """Yields of each example its number, its split, and a function that reads it."""
    if isinstance(unit, ExamplesWorkItem):
        for number, raw in enumerate(unit.examples, unit.first):
            yield number, unit.split, functools.partial(_decode, raw)
    elif isinstance(unit, LinesWorkItem) and plan.files is not None:
        for number, line in unit.block.lines():
            yield number, plan.files.split_of(unit.split, line), functools.partial(parse_line, line)


def _example(plan: TaskPlan, read: Any) -> Example | None:
    raw = read()
    if plan.files is not None and plan.files.preprocess is not None:
        raw = _preprocessed(plan.files.preprocess, raw)
        if raw is None:
            return None
    kind = TEXT_KINDS[plan.kind]
    return kind.tokenize(_worker.tokenizer, kind.to_canonical(raw), _worker.options)


def _preprocessed(preprocess: Preprocess, raw: dict[str, Any]) -> dict[str, Any] | None:
    try:
        reformatted = preprocess(raw)
    except RejectedExample:
        raise
    except Exception as error:  # A user's code: what it cannot read costs that line.
        raise RejectedExample(f"preprocess raised {type(error).__name__}") from None
    if reformatted is not None and not isinstance(reformatted, dict):
        raise RejectedExample(f"preprocess returned a {type(reformatted).__name__}")
    return reformatted


def _decode(raw: Any) -> Any:
    """Returns an example with plain strings in the place of TensorFlow's bytes."""
    if isinstance(raw, dict):
        return {name: _decode(value) for name, value in raw.items()}
    if isinstance(raw, list):
        return [_decode(value) for value in raw]
    try:
        return raw.decode() if isinstance(raw, bytes) else raw
    except UnicodeDecodeError:
        raise RejectedExample("invalid UTF-8") from None
