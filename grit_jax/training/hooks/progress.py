"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Mapping
import datetime

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class ProgressReport:
    """A context manager that shows the step, losses, tokens per second and remaining time.

    Args:
      start: the step that the run starts from.
      stop: the last step of the run.
      console: the console to print to, by default standard output.
    """

    def __init__(self, start: int, stop: int, console: Console | None = None):
        self._console = console or Console()
        self._stop = stop
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[values]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", completed=start, total=stop, values="")

    def __enter__(self) -> "ProgressReport":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def log(self, message: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics of a step."""
        seconds_left = round((self._stop - step) * metrics["step_seconds"])
        parts = [
            f"{name.removesuffix('_loss')} {metrics[name]:.3f}"
            for name in ("embedding_loss", "generative_loss")
            if name in metrics
        ]
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{datetime.timedelta(seconds=seconds_left)} left")
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, values="  ".join(parts))
        else:
            self.log(f"step {step}/{self._stop}  {'  '.join(parts)}")
