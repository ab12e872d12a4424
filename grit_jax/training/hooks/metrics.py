"""What a run writes down: a JSON object a line, the same for TensorBoard, and a picture."""

from collections.abc import Mapping
import contextlib
import json
import os
import time
from types import TracebackType
from typing import Any

from etils import epath
from matplotlib.figure import Figure

from grit_jax.arithmetic import ceil_div
from grit_jax.training.hooks.bucket_mirror import Mirror

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class MetricsWriter:
    """The files `metrics.jsonl` and `tensorboard` of a run; steps only grow in them.

    A context, at whose end all of it is there. In a bucket they are some seconds behind until then.

    Attributes:
      workdir: the run's folder.
      kept: the lines that were there before, as far as they are kept.

    Args:
      workdir: the run's folder.
      from_step: lines of later steps are dropped: a run that was stopped makes them again. At 0
        all are: the run begins anew, maybe from other weights.
      is_written: whether this process writes it; if not, nothing is.
    """

    def __init__(self, workdir: epath.Path, from_step: int, is_written: bool = True):
        self.workdir = workdir
        before = read_metrics(workdir / METRICS) if from_step else []
        self.kept = [line for line in before if line["step"] <= from_step]
        self._from_step, self._is_written = from_step, is_written
        self._mirror, self._opened = Mirror(workdir), contextlib.ExitStack()
        self._path = self._mirror.local / METRICS

    def __enter__(self) -> "MetricsWriter":
        if not self._is_written:
            return self
        # Where torch is installed it takes seconds.
        from tensorboardX.event_file_writer import EventsWriter

        incomplete = self._path.with_name(f".incomplete-{METRICS}")
        incomplete.write_text("".join(json.dumps(line) + "\n" for line in self.kept))
        incomplete.replace(self._path)
        self._opened.enter_context(self._mirror)
        events = self._mirror.local / TENSORBOARD / "events"
        events.parent.mkdir(exist_ok=True)
        # Not in the background, as by SummaryWriter, which waits for ever when its thread has
        # ended, as on a disk that is full. The suffix: else a file of the same second is lost.
        self._events = EventsWriter(os.fspath(events), f".from-{self._from_step}")
        self._opened.enter_context(contextlib.closing(self._events))
        # Events from here on that a run before has left do not count any more.
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
        """Adds a line with `step` and the values, and the events.

        Raises:
          OSError: the disk is full, for example.
        """
        if not self._is_written:
            return
        from tensorboardX.summary import scalar

        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.write_event(_event(step, summary=scalar(name, value)))
        self._events.flush()

    def flush(self) -> None:
        """Returns when all lines are in place: a checkpoint of a later step would leave a gap.

        Raises:
          BucketError: the bucket cannot be written to.
        """
        if self._is_written:
            self._mirror.flush()


def _event(step: int, **content: Any) -> Any:
    """Returns an event of TensorBoard's."""
    from tensorboardX.proto import event_pb2

    messages: Any = event_pb2  # Made when it is imported, so that no type checker knows them.
    return messages.Event(wall_time=time.time(), step=step, **content)


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
    """Returns the lines of a `metrics.jsonl`, none if there is no such file.

    Lines that were cut off or garbled when the machine stopped are left out.
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
    """Draws the losses and the held-out measures of a run over its steps."""
    losses = ("embedding_loss", "generative_loss")
    panels = [name for name in losses if any(name in line for line in lines)]
    panels += sorted({name for line in lines for name in line if name.startswith("held_out/")})
    if not panels:
        return
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
