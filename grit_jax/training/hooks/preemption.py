"""A machine that is about to be taken away says so with SIGTERM: time to save and go."""

import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

# What a process ends with that has saved and is to be started again (EX_TEMPFAIL of sysexits.h).
EXIT_CODE = 75


class Preempted(Exception):
    """The run has saved its state because its machine is to go; the same command continues it."""


class Preemption:
    """A context in which SIGTERM does not end the process, but is told of.

    Several processes agree on one step after the signal has reached any of them, by JAX's own
    means. They ask after every step.
    """

    def __init__(self):
        self._is_told = False
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:  # Else JAX listens.
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def is_due(self, step: int) -> bool:
        """Returns whether to save after `step` steps and go."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._is_told

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._is_told = True
