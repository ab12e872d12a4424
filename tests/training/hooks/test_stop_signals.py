"""SIGTERM and SIGINT are noted, also while the main thread computes; a second SIGINT exits."""

import os
import signal
import time

import pytest

from grit_jax.training.hooks.stop_signals import StopSignals


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened in 10 seconds")


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_and_handlers_are_restored(number, exit_code, capfd):
    before = signal.getsignal(number)
    with StopSignals(lambda: 4) as signals:
        assert not signals.is_due(1)
        signal.raise_signal(number)
        wait_until(lambda: signals.is_due(2))
        assert signals.exit_code == exit_code
    assert signal.getsignal(number) == before
    printed = capfd.readouterr().err
    assert ("press Ctrl-C again to exit at once" in printed) == (number == signal.SIGINT)


@pytest.mark.parametrize(("saved", "named"), [(4, "continues from step 4"), (None, "starts anew")])
def test_a_second_interrupt_exits_at_once(saved, named, monkeypatch, capfd):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with StopSignals(lambda: saved):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        wait_until(lambda: codes)
    assert codes == [130]
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == f"interrupted: exited without saving; the same command {named}"
