"""A trace of some steps: what host and devices do, for TensorBoard's profiler or Perfetto."""

from etils import epath
import jax

from grit_jax.training.loop import StepReport


class Profile:
    """A hook, and a context, that records a trace of a range of steps.

    Args:
      folder: where the trace is written, under `plugins/profile`.
      first_step: the first step that is recorded; the one before it is made in this run as well.
      num_steps: how many are; 0 for none.
    """

    def __init__(self, folder: epath.Path, first_step: int, num_steps: int):
        self._folder = folder
        self._before = first_step - 1
        self._last = self._before + num_steps
        self._is_recording = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_recording:
            jax.profiler.stop_trace()

    def __call__(self, report: StepReport) -> None:
        """Takes note of a step."""
        if report.step == self._before < self._last:
            jax.block_until_ready(report.metrics)
            jax.profiler.start_trace(self._folder)
            self._is_recording = True
        elif report.step == self._last and self._is_recording:
            jax.block_until_ready(report.metrics)
            jax.profiler.stop_trace()
            self._is_recording = False
