"""What a run writes down: lines and TensorBoard's events, continued without gaps or doubles."""

import contextlib
import json
import resource

from etils import epath
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grit_jax.training.hooks.metrics import METRICS, TENSORBOARD, MetricsWriter, read_metrics


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def test_a_continued_record_has_each_step_once(workdir):
    with MetricsWriter(workdir, from_step=0) as record:
        assert record.kept == []
        for step in (1, 2, 3):
            record.write(step, {"loss": step / 10})
    with (workdir / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')  # Killed in the middle of a line.
    with MetricsWriter(workdir, from_step=2) as record:
        assert record.kept == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]
        for step in (3, 4):
            record.write(step, {"loss": step / 100})
    assert read_metrics(workdir / METRICS) == [
        {"step": step, "loss": loss} for step, loss in ((1, 0.1), (2, 0.2), (3, 0.03), (4, 0.04))
    ]
    events = EventAccumulator(str(workdir / TENSORBOARD))
    events.Reload()
    shown = [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")]
    assert shown == [(1, 0.1), (2, 0.2), (3, 0.03), (4, 0.04)]


def test_a_run_that_begins_anew_keeps_nothing_of_the_one_before(workdir):
    for loss in (0.5, 0.7):  # It was stopped before its first checkpoint, and has other weights.
        with MetricsWriter(workdir, from_step=0) as record:
            assert record.kept == []
            record.write(0, {"held_out/loss": loss})
    assert read_metrics(workdir / METRICS) == [{"step": 0, "held_out/loss": 0.7}]
    events = EventAccumulator(str(workdir / TENSORBOARD))
    events.Reload()
    shown = [event.value for event in events.Scalars("held_out/loss")]
    assert shown == [pytest.approx(0.7)]


@contextlib.contextmanager
def no_file_over(num_bytes):
    """Simulates a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_cannot_be_written_ends_the_run_and_does_not_hold_it(workdir):
    def write_much():
        with MetricsWriter(workdir, from_step=0) as record, no_file_over(4096):
            for step in range(1000):
                record.write(step, {"loss": 1.0, "learning_rate": 1.0})

    with pytest.raises(OSError, match="too large"):
        write_much()


def test_a_process_that_does_not_write_changes_nothing(workdir):
    with MetricsWriter(workdir, from_step=0) as record:
        record.write(1, {"loss": 1.0})
        before = (workdir / METRICS).read_text()
        with MetricsWriter(workdir, from_step=0, is_enabled=False) as other:
            other.write(1, {"loss": 2.0})
        assert (workdir / METRICS).read_text() == before
    assert len(list((workdir / TENSORBOARD).iterdir())) == 1
    assert json.loads(before) == {"step": 1, "loss": 1.0}


def test_a_line_that_a_power_cut_has_garbled_is_left_out(workdir):
    (workdir / METRICS).write_bytes(b'{"step": 1}\n\0\0\0\0\n{"st\xff\n{"step": 2}\n')
    assert read_metrics(workdir / METRICS) == [{"step": 1}, {"step": 2}]
