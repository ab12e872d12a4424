"""Each Task once from text to token ids, into ArrayRecord shards that training reads at random."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
import contextlib
import json
import multiprocessing
import os
from pathlib import Path
import re
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

from grit_jax.data.manifest import TOKENIZERS, Manifest, PreparedDataError, save_tokenizer
from grit_jax.files import locked
from grit_jax.prepare.dataset_build import DatasetBuild
from grit_jax.prepare.worker import WorkItem, start_worker, tokenise
from grit_jax.prepare.writing import is_remote, write_atomically
from grit_jax.text.examples import TextOptions
from grit_jax.text.jsonl import SUFFIXES, SourceError
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.user_modules import import_named


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
) -> list[str]:
    """Prepares every Task of these seqio Mixtures, all splits, below `output`.

    A dataset that is already there as it would be made is left alone; another is replaced once its
    successor is whole. A dataset that cannot be prepared does not keep others from it.

    Args:
      names: registered Mixtures; or folders and files, as PATH or NAME=PATH.
      modules: Python modules to import first, for the Mixtures that they declare.
      output: folder for the prepared datasets (see `grit_jax.data.manifest`).
      tokenizer: text to ids.
      options: how texts become token ids.
      processes: number of processes that tokenise, by default one a core.
      held_out: fraction to be held out of the datasets of a PATH.
      seed: of the choice of held-out lines.
      max_rejected: fraction of the lines of a dataset that may be rejected.
      redo: prepare what is there as well.

    Returns:
      The names of the Mixtures.

    Raises:
      PreparedDataError: a Mixture is unknown, or a dataset cannot be prepared.
      SourceError: a source is not there.
    """
    output = epath.Path(output)
    processes = processes or len(os.sched_getaffinity(0))
    mixtures = _declare(names, modules, held_out, seed)
    jobs = _jobs(mixtures, output, tokenizer, options)
    try:
        with _workplace(output) as incomplete:
            save_tokenizer(tokenizer, output)
            pending = [job for job in jobs if _is_to_do(job, redo)]
            if pending:
                with _pool(pending, tokenizer, options, incomplete, processes) as pool:
                    _run(pending, pool, incomplete, max_rejected, processes)
    except OSError as error:  # A disk that is full, a folder that may not be written to.
        raise PreparedDataError(f"{output} cannot be written: {error}") from None
    failed = {job.name: job.error for job in jobs if job.error is not None}
    for mixture in mixtures:
        if not failed.keys() & {task.name for task in mixture.tasks}:
            _write_mixture(mixture, output, {job.name: job.manifests for job in jobs})
    if failed:
        raise PreparedDataError(_failure(failed))
    return [mixture.name for mixture in mixtures]


def _declare(names: Sequence[str], modules: Sequence[str], held_out: float, seed: int) -> list:
    """Imports the modules, declares what is given as a path, and returns the seqio Mixtures."""
    import seqio  # TensorFlow, which nothing but preparing needs.

    from grit_jax.prepare.seqio_tasks import COLLECTIONS, add_collection

    for module in modules:
        # Its functions are sent to the processes themselves: they do not import it, nor seqio.
        cloudpickle.register_pickle_by_value(import_named(module))
    mixtures = []
    for name in names:
        given, path = _name_and_path(name)
        if not given and name in seqio.MixtureRegistry.names():
            mixtures.append(name)
        elif given or "/" in name or name.endswith(SUFFIXES) or epath.Path(name).exists():
            given = given or re.sub(r"[^\w.]+", "_", _stem(path))
            mixtures += add_collection(given, path, held_out, seed)
        elif name in COLLECTIONS:
            raise PreparedDataError(f"{name!r} is read from files: say {name}=FOLDER")
        else:
            known = ", ".join(sorted(seqio.MixtureRegistry.names()))
            raise PreparedDataError(
                f"unknown mixture {name!r}, and no such file or folder; there are: {known}"
            )
    return [seqio.MixtureRegistry.get(name) for name in mixtures]


def _name_and_path(source: str) -> tuple[str, str]:
    """Returns NAME and PATH of NAME=PATH; of a PATH, which may have a "=" in it, no name."""
    name, equals, path = source.partition("=")
    is_path = not equals or "/" in name or epath.Path(source).exists()
    return ("", source) if is_path else (name, path)


def _stem(path: str) -> str:
    name = epath.Path(path).resolve().name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    return name


def _jobs(mixtures: list, output: epath.Path, tokenizer: Tokenizer, options: TextOptions):
    from grit_jax.prepare.sources import source_of

    tasks = {task.name: task for mixture in mixtures for task in mixture.tasks}
    if TOKENIZERS in tasks:
        raise SourceError(f"no dataset can be called {TOKENIZERS!r}, as the tokenizer's folder is")
    return [DatasetBuild(source_of(task), output, tokenizer, options) for task in tasks.values()]


def _is_to_do(job: DatasetBuild, redo: bool) -> bool:
    reason = job.look_for_finished()
    if reason is None and not redo:
        print(f"{job.folder}: there already")
        return False
    if reason not in (None, "new"):
        print(f"{job.folder}: made again ({reason})")
    job.manifests = {}
    return True


@contextlib.contextmanager
def _workplace(output: epath.Path) -> Iterator[Path]:
    """Yields a folder for what is not whole yet, which no other run has at the same time.

    Beside its place, so that a dataset is moved there in one go; for a bucket, on this machine.
    """
    if is_remote(output):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    output.mkdir(parents=True, exist_ok=True)
    busy = PreparedDataError(
        f"{output}: another grit-jax prepare is at work there; wait for it, or take another "
        "--output"
    )
    with locked(output, busy):
        folder = Path(output / ".incomplete")
        # What a run that was killed left behind.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _pool(
    jobs: Sequence[DatasetBuild],
    tokenizer: Tokenizer,
    options: TextOptions,
    folder: Path,
    processes: int,
) -> Iterator[ProcessPoolExecutor]:
    """Yields the processes; what they have not begun when an error comes is dropped."""
    try:
        plans = cloudpickle.dumps({job.name: job.source.plan for job in jobs})
    except Exception as error:
        raise SourceError(f"a `preprocess` cannot be sent to other processes: {error}") from None
    pool = ProcessPoolExecutor(
        processes,
        # TensorFlow is loaded in this process and not safe to fork; the others never load it.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(tokenizer.name, options, plans, folder),
    )
    try:
        yield pool
    except BrokenProcessPool:
        raise PreparedDataError(
            "a process that tokenises has ended abruptly (killed, or out of memory?); finished "
            "datasets stay: run the command again to go on, with fewer --processes if memory is "
            "short"
        ) from None
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _run(
    jobs: Sequence[DatasetBuild],
    pool: ProcessPoolExecutor,
    incomplete: Path,
    max_rejected: float,
    processes: int,
) -> None:
    """Makes all Tasks, one after the other, but without waiting for one to end."""
    from grit_jax.prepare.sources import ITEMS_PER_PROCESS

    under_way: deque[tuple[DatasetBuild, WorkItem, int, Future] | DatasetBuild] = deque()
    with _Bars() as bars:

        def collect() -> None:
            done = under_way.popleft()
            if isinstance(done, DatasetBuild):
                done.finish(incomplete, max_rejected)
                bars.end(done)
                return
            job, unit, position, future = done
            job.add(unit, future.result())
            bars.move(job, position)

        for job in jobs:
            try:
                for unit, position in job.source.units(processes):
                    under_way.append((job, unit, position, pool.submit(tokenise, unit)))
                    while len(under_way) > ITEMS_PER_PROCESS * processes:
                        collect()
            except SourceError as error:
                job.error = str(error)
            under_way.append(job)
        while under_way:
            collect()


class _Bars:
    """A progress bar for each Task under way, and a report of each that has ended."""

    def __init__(self):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(show_speed=True),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, transient=True, disable=not Console().is_terminal)
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def move(self, job: DatasetBuild, position: int) -> None:
        if job.name not in self._bars:
            self._bars[job.name] = self._progress.add_task(job.name, total=job.source.size)
        self._progress.update(self._bars[job.name], completed=position)

    def end(self, job: DatasetBuild) -> None:
        if job.name in self._bars:
            self._progress.remove_task(self._bars.pop(job.name))
        for split, manifest in job.manifests.items():
            rejected = sum(manifest.rejected.values())
            left_out = f", {manifest.left_out} left out" if manifest.left_out else ""
            print(
                f"{job.folder / split}: {manifest.count} examples{left_out}, "
                f"{rejected} rejected{job.reasons(split)}"
            )


def _write_mixture(mixture, output: epath.Path, made: dict[str, dict[str, Manifest]]) -> None:
    from grit_jax.prepare.seqio_tasks import record_size

    for task in mixture.tasks:
        record_size(task, made[task.name]["train"].count if "train" in made[task.name] else 0)
    stored = {
        "rates": {task.name: mixture.get_rate(task) for task in mixture.tasks},
        "splits": {task.name: sorted(made[task.name], reverse=True) for task in mixture.tasks},
    }
    write_atomically(output / f"{mixture.name}.json", json.dumps(stored) + "\n")


def _failure(failed: dict[str, str]) -> str:
    if len(failed) == 1:
        return next(iter(failed.values()))
    print(*failed.values(), sep="\n")
    return f"{len(failed)} datasets were not prepared (see above): {', '.join(failed)}"
