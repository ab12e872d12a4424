"""The watchdog ends a process without progress, and no other."""

import os
import threading
import time

from command_line import ROOT, run_python
import pytest

from grit_jax.training.hooks.watchdog import EXIT_CODE, Watchdog
from grit_jax.training.loop import StepReport

REPORT = StepReport(1, None, {})


@pytest.mark.slow
def test_a_process_that_hangs_after_a_step_ends_and_says_where_it_hangs():
    script = """
import time
from grit_jax.training.hooks.watchdog import Watchdog
from grit_jax.training.loop import StepReport

def hang():
    time.sleep(60)

with Watchdog(0.5) as watchdog:
    watchdog(StepReport(7, None, {}))
    hang()
"""
    finished = run_python(script, cwd=ROOT)
    assert finished.returncode == EXIT_CODE
    assert "no step for 0.5 s after step 7" in finished.stderr
    assert "config.watchdog_timeout_seconds" in finished.stderr
    assert "in hang" in finished.stderr


def test_a_run_with_progress_goes_on_and_may_end_right_after_a_step(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with Watchdog(0.5) as watchdog:
        for _ in range(4):
            time.sleep(0.2)
            watchdog(REPORT)
    for _ in range(20):  # The end may come while the watchdog handles the step.
        with Watchdog(0.05) as watchdog:
            watchdog(REPORT)
    threads = [thread for thread in threading.enumerate() if thread.name == "watchdog"]
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    assert not ended


def test_without_a_timeout_there_is_no_watchdog(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with Watchdog(0):
        time.sleep(0.1)
    assert not ended
