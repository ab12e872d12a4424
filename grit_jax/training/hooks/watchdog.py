"""A watchdog that ends a process without progress and prints a stack trace of each thread.

JAX ends all processes of a run about 100 seconds after one of them has died. If one hangs instead,
the others would wait for it forever.
"""

import faulthandler
import os
import socket
import sys
import threading

import jax

from grit_jax.training.loop import StepReport

# The exit code of processes that JAX ends (SIGABRT), so that a supervisor restarts both.
EXIT_CODE = 134


class Watchdog:
    """A hook and context manager that ends the process if no step completes for too long.

    Args:
      seconds: the maximum time between steps, including evaluation and checkpoints; 0 disables the
        watchdog.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._step: int | None = None
        self._progress = threading.Event()
        self._is_over = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over = True
        self._progress.set()

    def __call__(self, report: StepReport) -> None:
        """Restarts the timeout after a step."""
        self._step = report.step
        self._progress.set()

    def _watch(self) -> None:
        while self._progress.wait(self._seconds):
            self._progress.clear()  # Before the check below, which could miss the end otherwise.
            if self._is_over:
                return
        where = "since the start" if self._step is None else f"after step {self._step}"
        print(
            f"process {jax.process_index()} on {socket.gethostname()}: no step for "
            f"{self._seconds:g} s {where}. The process whose stack trace does not wait for its "
            "devices is the one that hangs. config.watchdog_timeout_seconds sets this timeout",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_CODE)
