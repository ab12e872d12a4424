"""A Task in pieces for the worker processes, and what it is made from: of lines, or from seqio."""

from collections.abc import Iterator
import dataclasses
import itertools
import re
from typing import Any

from etils import epath
import seqio

from grit_jax.prepare.fingerprints import describe_file, describe_files, describe_functions
from grit_jax.prepare.seqio_tasks import JsonlSource, kind_of
from grit_jax.prepare.worker import ExamplesWorkItem, LinesWorkItem, TaskPlan, WorkItem
from grit_jax.text.jsonl import MEGABYTE, SourceError, read_blocks

EXAMPLES_PER_ITEM = 4096
# Pieces under way for each process: one being made, and the next at hand.
ITEMS_PER_PROCESS = 2
# A shard comes from one block: small enough to keep all processes busy, large enough to be few.
SMALLEST_BLOCK, LARGEST_BLOCK = MEGABYTE // 4, 32 * MEGABYTE
BLOCKS_PER_PROCESS = 4
# Bytes of all blocks that wait or are worked on, whatever the number of processes.
BYTES_AT_ONCE = 512 * MEGABYTE
# What gzip makes of text, about.
COMPRESSION = 4


@dataclasses.dataclass(frozen=True)
class Source:
    """A Task as a run reads it.

    Attributes:
      task: the seqio Task.
      plan: what the worker processes need to know of it.
      size: bytes of its files; None for another source.
    """

    task: seqio.Task
    plan: TaskPlan
    size: int | None

    @property
    def splits_with_sources(self) -> tuple[str, ...]:
        """Splits that have a source of their own, which must not be empty."""
        files = self.plan.files
        return tuple(self.task.splits) if files is None else tuple(files.files)

    def describe(self) -> dict[str, Any]:
        """Returns what the Task is made from, as far as it can be seen."""
        if self.plan.files is not None:
            return describe_files(self.plan.files)
        source = self.task.source
        shown = repr(source)
        if isinstance(source, seqio.TfdsDataSource):  # It leaves out which parts of splits it is.
            shown += repr(source.tfds_dataset)
        described: dict[str, Any] = {
            "source": re.sub(r" at 0x[0-9a-f]+", "", shown),
            "functions": describe_functions([v for v in vars(source).values() if callable(v)]),
            "preprocessors": describe_functions(self.task.preprocessors),
        }
        if isinstance(source, seqio.FileDataSource):
            described["files"] = {
                split: [describe_file(epath.Path(file)) for file in source.list_shards(split)]
                for split in source.splits
            }
        return described

    def units(self, num_processes: int) -> Iterator[tuple[WorkItem, int]]:
        """Yields the Task in pieces, and how much of `size` is read with each.

        Raises:
          SourceError: a file is damaged.
        """
        if self.plan.files is not None:
            return self._units_of_lines(num_processes)
        return self._units_of_examples()

    def _units_of_lines(self, num_processes: int) -> Iterator[tuple[WorkItem, int]]:
        number = before = 0
        for split, files in self.plan.files.files.items() if self.plan.files else ():
            for file in files:
                for block in read_blocks(file, _block_bytes(file, num_processes)):
                    yield (
                        LinesWorkItem(self.task.name, split, number, file.name, block),
                        (before + block.position),
                    )
                    number += 1
                before += file.stat().length

    def _units_of_examples(self) -> Iterator[tuple[WorkItem, int]]:
        number = before = 0
        for split in self.task.splits:
            first = 1
            for examples in self._examples(split):
                before += len(examples)
                yield (
                    ExamplesWorkItem(self.task.name, split, number, split, first, examples),
                    before,
                )
                number, first = number + 1, first + len(examples)

    def _examples(self, split: str) -> Iterator[list[dict[str, Any]]]:
        try:
            dataset = self.task.get_dataset(split=split, shuffle=False).as_numpy_iterator()
            while batch := list(itertools.islice(dataset, EXAMPLES_PER_ITEM)):
                yield [{name: _to_python(value) for name, value in raw.items()} for raw in batch]
        except OSError as error:  # A download that fails, a disk that is full.
            raise SourceError(f"the Task {self.task.name!r} cannot be read: {error}") from None


def source_of(task: seqio.Task) -> Source:
    """Returns a Task as a run reads it.

    Raises:
      SourceError: it has other features than ours, or seqio's preprocessors on files of lines.
    """
    kind = kind_of(task)
    if not isinstance(task.source, JsonlSource):
        # A TFDS dataset that is asked for its size before it is there never knows it.
        return Source(task, TaskPlan(kind, None), None)
    if task.preprocessors:
        raise SourceError(
            f"the Task {task.name!r}: lines are reformatted by a plain function on each, "
            "jsonl_source(..., preprocess=function), and not by seqio's preprocessors"
        )
    files = task.source.jsonl
    size = sum(file.stat().length for own in files.files.values() for file in own)
    return Source(task, TaskPlan(kind, files), size)


def _block_bytes(file: epath.Path, num_processes: int) -> int:
    size = file.stat().length * (COMPRESSION if file.name.endswith(".gz") else 1)
    wanted = size // (BLOCKS_PER_PROCESS * num_processes)
    largest = min(LARGEST_BLOCK, BYTES_AT_ONCE // (ITEMS_PER_PROCESS * num_processes))
    return max(min(wanted, largest), SMALLEST_BLOCK)


def _to_python(value: Any) -> Any:
    """Returns bytes, and lists of them, in the place of NumPy's."""
    return value.tolist() if hasattr(value, "tolist") else value
