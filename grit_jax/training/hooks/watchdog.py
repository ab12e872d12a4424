"""A run in which nothing moves any more ends, and says what each of its threads is waiting for.

A process that is gone is missed by JAX, which ends the others after 100 seconds without a sign of
it. One that is there, but stuck, keeps all of them waiting for ever.
"""

import faulthandler
import os
import socket
import sys
import threading

import jax

from grit_jax.training.loop import StepReport

# What a process ends with that is to be started again: that of those whom JAX ends (SIGABRT).
EXIT_CODE = 134


class Watchdog:
    """A hook, and a context, that ends the process when no step follows for too long.

    Args:
      seconds: the time within which the next step must follow, with what is done after a step;
        0: any time.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._step: int | None = None
        self._has_moved = threading.Event()
        self._is_over = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over = True
        self._has_moved.set()

    def __call__(self, report: StepReport) -> None:
        """Takes note of a step."""
        self._step = report.step
        self._has_moved.set()

    def _watch(self) -> None:
        while self._has_moved.wait(self._seconds):
            self._has_moved.clear()  # Before the look, or the end that follows it could be lost.
            if self._is_over:
                return
        where = "since the start" if self._step is None else f"after step {self._step}"
        print(
            f"process {jax.process_index()} on {socket.gethostname()}: no step for "
            f"{self._seconds:g} s {where}. The process that does not wait for its devices below is "
            "the one that is stuck; config.watchdog_timeout_seconds sets the time",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_CODE)
