"""Profiler traces of host and devices, for TensorBoard or Perfetto."""

from etils import epath
import jax

from grit_jax.training.loop import StepReport


class Profiler:
    """A hook and context manager that records a trace of consecutive steps.

    Nothing is recorded if the run continues from `first_step` or later.

    Args:
      folder: folder of the trace, which is written under `plugins/profile`.
      first_step: first step in the trace.
      num_steps: number of steps in the trace; 0 disables it.
    """

    def __init__(self, folder: epath.Path, first_step: int, num_steps: int):
        self._folder = folder
        self._before = first_step - 1
        self._last = self._before + num_steps
        self._is_recording = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_recording:
            jax.profiler.stop_trace()

    def __call__(self, report: StepReport) -> None:
        """Starts or stops the trace after a step."""
        if report.step == self._before < self._last:
            jax.block_until_ready(report.metrics)
            jax.profiler.start_trace(self._folder)
            self._is_recording = True
        elif report.step == self._last and self._is_recording:
            jax.block_until_ready(report.metrics)
            jax.profiler.stop_trace()
            self._is_recording = False
