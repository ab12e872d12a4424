"""Tokenizes datasets once, into ArrayRecord shards that training reads in random order."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
import contextlib
import json
import multiprocessing
import os
from pathlib import Path
import shutil
import tempfile

import cloudpickle
from etils import epath
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from grit_jax.data.manifest import TOKENIZERS, PreparedDataError, save_tokenizer
from grit_jax.files import locked, write_atomically
from grit_jax.prepare.dataset_build import DatasetBuild
from grit_jax.prepare.datasets import Mixture, record_size
from grit_jax.prepare.resolve import find_mixtures
from grit_jax.prepare.sources import ITEMS_PER_PROCESS
from grit_jax.prepare.worker import WorkerPlan, WorkItem, start_worker, tokenize
from grit_jax.prepare.writing import is_remote
from grit_jax.text.examples import TextOptions
from grit_jax.text.jsonl import SourceError
from grit_jax.text.tokenizer import Tokenizer


def prepare_mixtures(
    names: Sequence[str],
    modules: Sequence[str],
    output: epath.PathLike,
    tokenizer: Tokenizer,
    options: TextOptions,
    *,
    processes: int | None = None,
    held_out: float = 0.0,
    seed: int = 0,
    max_rejected: float = 0.1,
    redo: bool = False,
    columns: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """Prepares all splits of every dataset of these mixtures in `output`.

    A dataset that is up to date is not prepared again. An outdated dataset is replaced when its new
    version is complete. If a dataset cannot be prepared, the others still are.

    Args:
      names: declared mixtures, or folders and files as PATH or NAME=PATH.
      modules: Python modules to import first, for the mixtures that they declare.
      output: folder for the prepared datasets (see `grit_jax.data.manifest`).
      tokenizer: text to ids.
      options: how texts are tokenized.
      processes: number of worker processes; by default one per core.
      held_out: fraction of the datasets of a PATH to hold out.
      seed: seed for choosing held-out rows.
      max_rejected: fraction of a dataset's lines that may be rejected.
      redo: also prepare datasets that are up to date.
      columns: the columns of files to read for each name (see `RowReader`).

    Returns:
      The names of the mixtures.

    Raises:
      PreparedDataError: a mixture is unknown, or a dataset cannot be prepared.
      SourceError: a source does not exist or cannot be used.
    """
    output = epath.Path(output)
    processes = processes or len(os.sched_getaffinity(0))
    mixtures = find_mixtures(names, modules, held_out, seed, columns)
    builds = _builds(mixtures, output, tokenizer, options)
    try:
        with _work_folder(output) as incomplete:
            save_tokenizer(tokenizer, output)
            pending = [build for build in builds.values() if _must_build(build, redo)]
            if pending:
                with _pool(pending, tokenizer, options, incomplete, processes) as pool:
                    _build_all(pending, pool, incomplete, max_rejected, processes)
    except OSError as error:  # E.g. a full disk, or no permission to write.
        raise PreparedDataError(f"{output} cannot be written: {error}") from None
    failed = {build.name: build.error for build in builds.values() if build.error is not None}
    for mixture in mixtures:
        if not failed.keys() & {dataset.name for dataset in mixture.rates}:
            _write_mixture(mixture, output, builds)
    if failed:
        raise PreparedDataError(_failure(failed))
    return [mixture.name for mixture in mixtures]


def _builds(
    mixtures: Sequence[Mixture], output: epath.Path, tokenizer: Tokenizer, options: TextOptions
) -> dict[str, DatasetBuild]:
    """Returns a build of each dataset by name; mixtures may share datasets."""
    datasets = {dataset.name: dataset for mixture in mixtures for dataset in mixture.rates}
    if TOKENIZERS in datasets:
        raise SourceError(f"no dataset can be called {TOKENIZERS!r}: the tokenizer's folder is")
    return {
        name: DatasetBuild(dataset, output, tokenizer, options)
        for name, dataset in datasets.items()
    }


def _must_build(build: DatasetBuild, redo: bool) -> bool:
    reason = build.reason_to_build()
    if reason is None and not redo:
        print(f"{build.folder}: up to date")
        return False
    if reason not in (None, "new"):
        print(f"{build.folder}: prepared again ({reason})")
    build.manifests = {}
    return True


@contextlib.contextmanager
def _work_folder(output: epath.Path) -> Iterator[Path]:
    """Yields a folder for incomplete datasets, locked against other runs.

    It is in `output`, so that a complete dataset is moved in one step. For a bucket it is a local
    temporary folder.
    """
    if is_remote(output):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    output.mkdir(parents=True, exist_ok=True)
    busy = PreparedDataError(
        f"{output}: another grit-jax prepare is running there; wait for it, or use another --output"
    )
    with locked(output, busy):
        folder = Path(output / ".incomplete")
        # Left behind by a run that was killed.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _pool(
    builds: Sequence[DatasetBuild],
    tokenizer: Tokenizer,
    options: TextOptions,
    folder: Path,
    processes: int,
) -> Iterator[ProcessPoolExecutor]:
    """Yields the pool of workers; after an error, work that has not begun is canceled."""
    plans = {
        build.name: WorkerPlan(build.dataset.kind, build.dataset.source.files) for build in builds
    }
    try:
        settings = cloudpickle.dumps((tokenizer.files, options, plans))
    except Exception as error:
        raise SourceError(f"a `preprocess` cannot be sent to other processes: {error}") from None
    # In a file: a process that starts while the parent is interrupted would read half a pipe.
    settings_file = folder / ".settings"
    settings_file.write_bytes(settings)
    pool = ProcessPoolExecutor(
        processes,
        # Forking is not safe: a module of the user may have loaded TensorFlow, and tests load JAX.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(settings_file, folder),
    )
    try:
        yield pool
    except BrokenProcessPool:
        raise PreparedDataError(
            "a worker process ended abruptly (killed, or out of memory?); finished datasets stay: "
            "run the command again to go on, with fewer --processes if memory is short"
        ) from None
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _build_all(
    builds: Sequence[DatasetBuild],
    pool: ProcessPoolExecutor,
    incomplete: Path,
    max_rejected: float,
    processes: int,
) -> None:
    """Builds datasets in order; the next one starts before the last one is finished."""
    # Submitted work items, and after the items of a build the build itself.
    queue: deque[tuple[DatasetBuild, WorkItem, int, Future] | DatasetBuild] = deque()
    with _ProgressBars() as bars:

        def collect() -> None:
            first = queue.popleft()
            if isinstance(first, DatasetBuild):
                first.finish(incomplete, max_rejected)
                bars.finish(first)
                return
            build, item, position, future = first
            build.add(item, future.result())
            bars.update(build, position)

        for build in builds:
            try:
                for item, position in build.dataset.source.work_items(build.name, processes):
                    queue.append((build, item, position, pool.submit(tokenize, item)))
                    while len(queue) > ITEMS_PER_PROCESS * processes:
                        collect()
            except SourceError as error:
                build.error = str(error)
            queue.append(build)
        while queue:
            collect()


class _ProgressBars:
    """A progress bar for each dataset being built, and a report when it is finished."""

    def __init__(self):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(show_speed=True),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, transient=True, disable=not Console().is_terminal)
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> "_ProgressBars":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def update(self, build: DatasetBuild, position: int) -> None:
        if build.name not in self._bars:
            total = build.dataset.source.size
            self._bars[build.name] = self._progress.add_task(build.name, total=total)
        self._progress.update(self._bars[build.name], completed=position)

    def finish(self, build: DatasetBuild) -> None:
        if build.name in self._bars:
            self._progress.remove_task(self._bars.pop(build.name))
        for split in build.manifests:
            print(build.report(split))


def _write_mixture(
    mixture: Mixture, output: epath.Path, builds: Mapping[str, DatasetBuild]
) -> None:
    """Writes the mixture's file, which training reads: the rates and splits of its datasets."""
    for dataset in mixture.rates:
        manifests = builds[dataset.name].manifests
        record_size(dataset.name, manifests["train"].count if "train" in manifests else 0)
    stored = {
        "rates": {dataset.name: mixture.rate(dataset) for dataset in mixture.rates},
        "splits": {
            dataset.name: sorted(builds[dataset.name].manifests, reverse=True)
            for dataset in mixture.rates
        },
    }
    path, text = output / f"{mixture.name}.json", json.dumps(stored) + "\n"
    if is_remote(path):  # In a bucket a file appears when it is closed.
        path.write_text(text)
    else:
        write_atomically(path, text)


def _failure(failed: dict[str, str]) -> str:
    if len(failed) == 1:
        return next(iter(failed.values()))
    print(*failed.values(), sep="\n")
    return f"{len(failed)} datasets were not prepared (see above): {', '.join(failed)}"
