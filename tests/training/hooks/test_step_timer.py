"""Speed is that of the steps; goodput is their share of the time since the first start."""

import time

import jax.numpy as jnp
import optax
import pytest

from grit_jax.training.hooks.step_timer import Goodput, StepTimer
from grit_jax.training.loop import StepReport


class Clock:
    """A fake clock, which a test advances."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def report(step, compile_seconds=0.0):
    metrics = {"loss": jnp.float32(2.0), "tokens": 100, "useful_flops": 4e12}
    times = {"data_wait_seconds": 0.5, "compile_seconds": compile_seconds}
    return StepReport(step, None, metrics | times)


def test_compiling_and_pauses_are_no_steps(clock):
    lines = []
    goodput = Goodput([])
    clock.now += 10  # What comes before the first step.
    step_timer = StepTimer(
        2, 4, lambda _: 0.1, [lambda step, line: lines.append(line)], goodput, peak_flops=8e12
    )
    for step, seconds, compiling in ((1, 9, 7), (2, 2, 0), (3, 2, 0), (4, 2, 0)):
        clock.now += seconds
        last = report(step, compiling)
        step_timer(last)
        with step_timer.pause(last):
            clock.now += 5 if step == 2 else 0
    first, second = lines
    assert first["step_seconds"] == second["step_seconds"] == 2
    assert first["tokens_per_second"] == second["tokens_per_second"] == 50
    assert first["useful_tflops_per_second"] == 2 and first["mfu"] == 0.25
    assert first["data_wait_fraction"] == 0.25
    assert first["goodput"] == 4 / 21 and first["wall_seconds"] == 21
    assert second["goodput"] == 8 / 30
    assert not {"data_wait_seconds", "compile_seconds", "useful_flops"} & first.keys()


def test_skipped_steps_do_not_lower_the_learning_rate(clock):
    # As the optimizer's schedule counts.
    optimizer = optax.apply_if_finite(optax.scale_by_schedule(lambda count: 1.0 - count / 10), 9)
    state, lines = optimizer.init(jnp.ones(())), []
    step_timer = StepTimer(
        1, 4, lambda count: 1.0 - count / 10, [lambda _, line: lines.append(line)], Goodput([])
    )
    for step, gradient in enumerate((1.0, jnp.nan, jnp.nan, 1.0), start=1):
        clock.now += 1
        update, state = optimizer.update(jnp.float32(gradient), state)
        last = report(step)
        last.metrics["steps_skipped"] = state.total_notfinite
        step_timer(last)
    assert lines[-1]["learning_rate"] == pytest.approx(float(update)) == pytest.approx(0.9)


def test_goodput_goes_on_where_the_kept_steps_end(clock):
    goodput = Goodput([])
    clock.now += 10
    kept = {"step": 5} | goodput.add(6)
    assert kept["goodput"] == 0.6
    clock.now += 20
    goodput.add(20)  # Lost: the process is killed, and starts again from step 5.
    clock.now += 10
    again = Goodput([kept, {"step": 5, "checkpoint_seconds": 0.1}])
    clock.now += 10
    line = again.add(4)
    assert line["wall_seconds"] == 50
    assert line["goodput"] == (6 + 4) / 50
