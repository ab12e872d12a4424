"""The metrics of a run: `metrics.jsonl`, TensorBoard events, and a plot of the curves."""

from collections.abc import Mapping
import contextlib
import json
import os
import time
from types import TracebackType
from typing import Any

from etils import epath

from grit_jax.arithmetic import ceil_div
from grit_jax.files import write_atomically
from grit_jax.training.hooks.bucket_mirror import BucketMirror
from grit_jax.training.hooks.trackers import Tracker, log_to

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class MetricsWriter:
    """Writes metrics to `metrics.jsonl` and `tensorboard/` in the working directory.

    A context manager. In a bucket, the files are a few seconds behind until its end.

    Attributes:
      workdir: the working directory.
      kept: the earlier lines of `metrics.jsonl` that are kept.

    Args:
      workdir: the working directory.
      from_step: the step that the run continues from. Lines of later steps are dropped, since the
        run repeats these steps. At 0 all lines are dropped.
      is_enabled: whether this process writes the files.
      tracker: also gets the values; None for no tracker.
    """

    def __init__(
        self,
        workdir: epath.Path,
        from_step: int,
        is_enabled: bool = True,
        tracker: Tracker | None = None,
    ):
        self._tracker = tracker
        self.workdir = workdir
        before = read_metrics(workdir / METRICS) if from_step else []
        self.kept = [line for line in before if line["step"] <= from_step]
        self._from_step, self._is_enabled = from_step, is_enabled
        self._mirror, self._opened = BucketMirror(workdir), contextlib.ExitStack()
        self._path = self._mirror.local / METRICS

    def __enter__(self) -> "MetricsWriter":
        if not self._is_enabled:
            return self
        # This import takes seconds if torch is installed.
        from tensorboardX.event_file_writer import EventsWriter

        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in self.kept))
        self._opened.enter_context(self._mirror)
        events = self._mirror.local / TENSORBOARD / "events"
        events.parent.mkdir(exist_ok=True)
        # SummaryWriter writes in a thread, and hangs after that thread fails on a full disk.
        # Without a suffix, a file of the same second would be overwritten.
        self._events = EventsWriter(os.fspath(events), f".from-{self._from_step}")
        self._opened.enter_context(contextlib.closing(self._events))
        # TensorBoard discards earlier events of this and later steps.
        first = self._from_step + 1 if self._from_step else 0
        self._events.write_event(_event(first, session_log={"status": "START"}))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step.

        Raises:
          OSError: the file cannot be written, for example because the disk is full.
        """
        if not self._is_enabled:
            return
        from tensorboardX.summary import scalar

        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.write_event(_event(step, summary=scalar(name, value)))
        self._events.flush()
        if self._tracker is not None:
            log_to(self._tracker, step, values)

    def flush(self) -> None:
        """Waits until all lines are in the bucket.

        Called before a checkpoint is saved: a run that continues from it does not write earlier
        lines again.

        Raises:
          BucketError: the bucket cannot be written to.
        """
        if self._is_enabled:
            self._mirror.flush()


def _event(step: int, **content: Any) -> Any:
    """Returns a TensorBoard event."""
    from tensorboardX.proto import event_pb2

    messages: Any = event_pb2  # Its classes are made at import: type checkers do not know them.
    return messages.Event(wall_time=time.time(), step=step, **content)


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
    """Returns the lines of a `metrics.jsonl`, or an empty list if there is no such file.

    Lines that are incomplete because the machine stopped are skipped.
    """
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            if line.endswith(b"\n"):
                found.append(json.loads(line))
    return found


def draw_curves(lines: list[dict[str, Any]], path: epath.Path) -> None:
    """Plots the losses and the held-out metrics over the steps, as a PNG file."""
    losses = ("embedding_loss", "generative_loss")
    panels = [name for name in losses if any(name in line for line in lines)]
    panels += sorted({name for line in lines for name in line if name.startswith("held_out/")})
    if not panels:
        return
    from matplotlib.figure import Figure  # This import takes a second.

    columns = 2
    rows = ceil_div(len(panels), columns)
    figure = Figure(figsize=(4.5 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, name in zip(axes, panels, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else None)
        axis.set_title(name.replace("held_out/", "held-out ").replace("_", " "), fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
