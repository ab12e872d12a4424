"""Signals that stop a run after a step, with its state saved: SIGTERM and SIGINT (Ctrl-C)."""

from collections.abc import Callable
import os
import signal
import socket
import sys
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils
from rich.console import Console

# Exit codes: EX_TEMPFAIL, with which a supervisor restarts the process, and the one of shells.
RESTART, INTERRUPTED = 75, 128 + signal.SIGINT


class Stopped(Exception):
    """A signal has stopped the run, and its state is saved. The same command continues it.

    Attributes:
      exit_code: the exit code of this process.
    """

    def __init__(self, step: int, exit_code: int):
        super().__init__(f"stopped: saved after step {step}")
        self.exit_code = exit_code


class StopSignals:
    """A context manager in which SIGTERM and SIGINT are noted instead of ending the process.

    A second SIGINT ends the process at once. With several processes, all stop after the same step
    once any of them has received a signal. All must call `is_due` after every step.

    Args:
      saved_step: returns the step of the newest checkpoint, or None if there is none.
    """

    def __init__(self, saved_step: Callable[[], int | None]):
        self._saved_step = saved_step
        self._is_terminated = self._is_interrupted = False
        # With several processes, JAX handles SIGTERM.
        self._handled = [signal.SIGINT, *([signal.SIGTERM] if jax.process_count() == 1 else [])]
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Python's handlers wait until a compilation or step returns. The thread does not.
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._sender.fileno())
        for number in self._handled:
            self._previous[number] = signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._receive, name="stop signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        self._sender.close()
        self._thread.join()
        self._receiver.close()

    @property
    def exit_code(self) -> int:
        """The exit code of this process once the run has stopped."""
        return INTERRUPTED if self._is_interrupted else RESTART

    def is_due(self, step: int) -> bool:
        """Returns whether to save and exit after `step` steps."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._is_terminated

    def _receive(self) -> None:
        while numbers := self._receiver.recv(1):
            if numbers[0] == signal.SIGTERM:
                self._is_terminated = True
            elif numbers[0] == signal.SIGINT and not self._is_interrupted:
                self._is_interrupted = True
                _print("interrupted: saving after this step; press Ctrl-C again to exit at once")
                os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the other processes.
            elif numbers[0] == signal.SIGINT:
                self._exit_at_once()

    def _exit_at_once(self) -> None:
        step = self._saved_step()
        continues = "starts anew" if step is None else f"continues from step {step}"
        Console(stderr=True).show_cursor()  # A progress bar hides it.
        _print(f"interrupted: exited without saving; the same command {continues}")
        os._exit(INTERRUPTED)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
