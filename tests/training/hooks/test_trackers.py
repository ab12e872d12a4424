"""Trackers, without a network. Those whose package is not installed are skipped."""

import importlib.util
import json
import sys

from etils import epath
import pytest

from grit_jax.training.hooks.metrics import MetricsWriter
from grit_jax.training.hooks.trackers import TRACKERS, Tracker, TrackerError, log_to, open_tracker

CONFIG = {"steps": 4, "loss": {"temperature": 0.02}}


def write_run(name, workdir, step):
    """Writes two steps of a run that continues from `step`; returns the id of the tracker's run."""
    with (
        open_tracker(name, workdir, step == 0, CONFIG) as tracker,
        MetricsWriter(workdir, step, tracker=tracker) as metrics,
    ):
        for later in (step + 1, step + 2):
            metrics.write(later, {"loss": 1 / (later + 2), "held_out/perplexity": 7.0})
        return tracker.run_id


def recorded_losses(name, workdir, run_id):
    """Returns the losses that a tracker has recorded, by step."""
    if name == "mlflow":
        from mlflow import MlflowClient

        client = MlflowClient()
        assert client.get_run(run_id).data.params["loss.temperature"] == "0.02"
        return {m.step: m.value for m in client.get_metric_history(run_id, "loss")}
    if name == "trackio":
        from trackio.sqlite_storage import SQLiteStorage

        return {log["step"]: log["loss"] for log in SQLiteStorage.get_logs("grit-jax", run_id)}
    # The package has no reader of its offline files, in which values are JSON.
    content = b"".join(path.read_bytes() for path in workdir.glob("wandb/offline-run-*/*.wandb"))
    assert run_id.encode() in content
    return {s: 1 / (s + 2) for s in range(1, 6) if json.dumps(1 / (s + 2)).encode() in content}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Of the packages.
@pytest.mark.parametrize("name", TRACKERS)
def test_a_continued_run_continues_its_trackers_run(name, tmp_path, monkeypatch):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    workdir = epath.Path(tmp_path / "run")
    workdir.mkdir()
    first = write_run(name, workdir, 0)
    assert write_run(name, workdir, 2) == first
    losses = recorded_losses(name, tmp_path / "run", first)
    assert losses == pytest.approx({step: 1 / (step + 2) for step in (1, 2, 3, 4)})


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(TrackerError, match=r"config.tracker='wandb' needs .*: pip install wandb"),
        open_tracker("wandb", epath.Path(tmp_path), True, CONFIG),
    ):
        pass
    with open_tracker("tensorboard", epath.Path(tmp_path), True, CONFIG) as tracker:
        assert tracker is None


def test_errors_of_a_tracker_do_not_end_a_run(tmp_path):
    class Broken(Tracker):
        def _start(self, workdir, run_id, config):
            return "id"

        def log(self, step, values):
            raise ConnectionError("no network")

        def finish(self, *, failed):
            pass

    with pytest.warns(UserWarning, match="no network; metrics.jsonl has all metrics"):
        log_to(Broken(None, epath.Path(tmp_path), None, {}), 1, {"loss": 1.0})
