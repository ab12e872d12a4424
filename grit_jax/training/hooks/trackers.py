"""Experiment trackers, which also get the metrics of a run: W&B, Trackio and MLflow.

Their packages are imported only when they are chosen. Each is set up by its own environment
variables, such as WANDB_MODE=offline, TRACKIO_DIR or MLFLOW_TRACKING_URI.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
import contextlib
import importlib
import itertools
import json
from types import ModuleType
from typing import Any
import warnings

from etils import epath
from flax.traverse_util import flatten_dict

from grit_jax.bucket import in_bucket, one_line
from grit_jax.files import write_json

PROJECT = "grit-jax"
# The id of the tracker's run, so that a continued run continues it.
STORED = "tracker.json"
# Parameters that MLflow takes at once.
MLFLOW_BATCH = 100


class TrackerError(Exception):
    """A tracker cannot be used; the message says what to install."""


class Tracker(abc.ABC):
    """The run of a tracker.

    Args:
      package: the tracker's package.
      workdir: the working directory; its name is that of the run.
      run_id: the id of the run to continue, None for a new one.
      config: the configuration, as nested dictionaries.

    Attributes:
      run_id: the id of the run.
    """

    run_id: str

    def __init__(
        self, package: Any, workdir: epath.Path, run_id: str | None, config: Mapping[str, Any]
    ):
        self.package = package
        self.run_id = self._start(workdir, run_id, config)

    @abc.abstractmethod
    def _start(self, workdir: epath.Path, run_id: str | None, config: Mapping[str, Any]) -> str:
        """Starts or continues a run, and returns its id."""

    @abc.abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records the values of a step."""

    @abc.abstractmethod
    def finish(self, *, failed: bool) -> None:
        """Ends the run, after everything is recorded."""


class WandbTracker(Tracker):
    """A run of Weights & Biases."""

    def _start(self, workdir: epath.Path, run_id: str | None, config: Mapping[str, Any]) -> str:
        self._run = self.package.init(
            project=PROJECT,
            name=workdir.name,
            id=run_id,
            resume="allow",
            dir=None if in_bucket(workdir) else str(workdir),
            config=dict(config),
        )
        # W&B drops values of earlier steps, which a continued run repeats, but not by this axis.
        self._run.define_metric("*", step_metric="step")
        return self._run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log({"step": step, **values})

    def finish(self, *, failed: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=int(failed))


class TrackioTracker(Tracker):
    """A run of Trackio, whose id is its name."""

    def _start(self, workdir: epath.Path, run_id: str | None, config: Mapping[str, Any]) -> str:
        name = run_id or workdir.name
        self.package.init(project=PROJECT, name=name, resume="allow", config=dict(config))
        return name

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self.package.log(dict(values), step=step)

    def finish(self, *, failed: bool) -> None:
        """See `Tracker`."""
        self.package.finish()


class MlflowTracker(Tracker):
    """A run of MLflow."""

    def _start(self, workdir: epath.Path, run_id: str | None, config: Mapping[str, Any]) -> str:
        self.package.set_experiment(PROJECT)
        run = self.package.start_run(run_id=run_id, run_name=None if run_id else workdir.name)
        if run_id is None:  # MLflow does not let a continued run change them.
            fields = flatten_dict(dict(config), sep=".")
            for part in itertools.batched(fields.items(), MLFLOW_BATCH):
                self.package.log_params(dict(part))
        return run.info.run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self.package.log_metrics({k: float(v) for k, v in values.items()}, step=step)

    def finish(self, *, failed: bool) -> None:
        """See `Tracker`."""
        self.package.end_run(status="FAILED" if failed else "FINISHED")


TRACKERS: dict[str, type[Tracker]] = {
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
    "mlflow": MlflowTracker,
}


def import_tracker(name: str) -> ModuleType | None:
    """Returns the package of a tracker, None for "tensorboard", which is always written.

    Raises:
      TrackerError: the package is not installed.
    """
    if name not in TRACKERS:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrackerError(
            f"config.tracker={name!r} needs the package {name}: pip install {name} ({error})"
        ) from None


@contextlib.contextmanager
def open_tracker(
    name: str, workdir: epath.Path, is_new: bool, config: Mapping[str, Any]
) -> Iterator[Tracker | None]:
    """Yields the tracker's run for a training run, None for "tensorboard".

    Args:
      name: the value of `config.tracker`.
      workdir: the working directory. The id of the tracker's run is stored in it.
      is_new: whether the training run starts from step 0, with a new run of the tracker.
      config: the configuration, as nested dictionaries.

    Raises:
      TrackerError: the package is not installed, or the run cannot be started.
    """
    package = import_tracker(name)
    if package is None:
        yield None
        return
    path = workdir / STORED
    stored = json.loads(path.read_text()) if path.exists() and not is_new else {}
    try:
        tracker = TRACKERS[name](package, workdir, stored.get(name), config)
    except Exception as error:  # Their packages raise many types.
        raise TrackerError(f"config.tracker={name!r} cannot start: {one_line(error)}") from error
    write_json(path, {**stored, name: tracker.run_id})
    failed = True
    try:
        yield tracker
        failed = False
    finally:
        _warn_of_errors(name, lambda: tracker.finish(failed=failed))


def log_to(tracker: Tracker, step: int, values: Mapping[str, float]) -> None:
    """Records the values of a step. Errors are warnings: a run does not end with its tracker."""
    _warn_of_errors(type(tracker).__name__, lambda: tracker.log(step, values))


def _warn_of_errors(name: str, action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:  # Their packages and the network raise many types.
        warnings.warn(f"{name}: {one_line(error)}; metrics.jsonl has all metrics", stacklevel=3)
