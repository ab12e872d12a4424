"""Preemption: SIGTERM announces that a machine shuts down, and the run saves and exits."""

import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

# Exit code of a process that has saved its state and should be restarted (EX_TEMPFAIL).
EXIT_CODE = 75


class Preempted(Exception):
    """The run has saved its state before a shutdown; the same command continues it."""


class Preemption:
    """A context manager in which SIGTERM is noted instead of ending the process.

    With several processes, JAX makes all of them stop after the same step once any of them has
    received the signal. All must call `is_due` after every step.
    """

    def __init__(self):
        self._is_signaled = False
        self._previous_handler: Any = None

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:  # With several, JAX handles the signal.
            self._previous_handler = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def is_due(self, step: int) -> bool:
        """Returns whether to save and exit after `step` steps."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._is_signaled

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._is_signaled = True
