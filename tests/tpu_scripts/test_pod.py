"""pod.sh from nodes to a finished run, against a fake cloud in a folder with real processes."""

import re
import subprocess
import time

import pytest


def wait_for(path):
    deadline = time.monotonic() + 180
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


@pytest.mark.slow
def test_run_preempted_twice_finishes_and_nodes_are_deleted(pod):
    pod.plan("preempted", "preempted with a crash", "finish")
    pod("create")
    pod("setup")
    pod("launch")
    # The preemption must be detected before the crash counts as an error.
    output = pod("watch", HF_TOKEN="hf_secret", SETTLE_SECONDS="5")
    assert "run has finished: gs://bucket/run/run" in output
    assert pod.steps() == [1, 2, 3, 4, 5, 6]
    assert pod.count("create") == pod.count("delete") == 3
    logs = sorted(pod.bucket.glob("run/launches/*/*.log"))
    assert [log.name for log in logs] == ["run-w-0.log", "run-w-1.log"] * 3
    last = [path.read_text() for path in sorted(logs[-1].parent.glob("*.exit_code"))]
    assert last == ["0\n", "0\n"]
    assert "--config.data.embedding=words (2) --config.model.weights=" in logs[-1].read_text()
    pod.assert_nothing_is_left()
    for path in pod.cloud.rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes(), path
    assert "hf_secret" not in output


@pytest.mark.slow
def test_each_command_alone_on_two_slices(pod):
    """ssh fails once and is retried."""
    pod.set(NUM_SLICES="2", PROVISIONING="reserved", VALID_UNTIL_DURATION="6h")
    pod.change_cloud(devices=32, ssh_failures=1)
    pod.plan("wait for sigterm", "finish")
    output = pod("create")
    assert re.findall("WAITING_FOR_RESOURCES|PROVISIONING|ACTIVE", output) == [
        "WAITING_FOR_RESOURCES",
        "PROVISIONING",
        "ACTIVE",
    ]
    flags = pod.state()["queued_resources"]["run"]["flags"]
    assert flags["reserved"] and not flags["spot"] and flags["valid_until_duration"] == "6h"
    assert "32 devices" in pod("setup")
    pod("launch")
    workers = ["run-0-w-0", "run-0-w-1", "run-1-w-0", "run-1-w-1"]
    for worker in workers:
        wait_for(pod.cloud / f"training-{worker}")
    for verb in ("launch", "setup"):
        assert "a run is active" in pod(verb, code=2)
    status = pod("status")
    assert "queued resource run: ACTIVE" in status and "node run-1: READY" in status
    assert all(f"{worker}: training" in status for worker in workers)
    assert 'newest metrics: {"step": 2}' in status
    output = pod("stop")
    assert all(f"{worker}: ended with exit code 75" in output for worker in workers)
    pod.assert_nothing_runs()
    assert pod.state()["nodes"].keys() == {"run-0", "run-1"}
    weights = pod.bucket / "weights"
    (weights / "config.json").rename(weights / "another.json")
    assert "installed" in pod("setup")  # A second setup installs nothing.
    assert len((pod.cloud / "installs").read_text().splitlines()) == len(workers)
    copies = [pod.cloud / "workers" / worker / "grit-jax" / "weights" for worker in workers]
    assert [sorted(p.name for p in copy.iterdir()) for copy in copies] == [["another.json"]] * 4
    pod("delete")
    assert "there are no nodes" in pod("delete")
    assert "queued resource run: NONE" in pod("status")


@pytest.mark.slow
def test_lost_worker_restarts_the_run_on_the_same_nodes(pod):
    pod.plan("lose a worker", "vanish", "finish")
    output = pod("watch", SETTLE_SECONDS="4", SILENT_SECONDS="6")
    assert "lost with the exit codes 134, 137" in output and "no log from a worker" in output
    assert pod.steps() == [1, 2, 3, 4, 5, 6]
    assert pod.count("create") == 1
    pod.assert_nothing_is_left()
    assert "has finished" in pod("watch") and pod.count("create") == 1


@pytest.mark.slow
@pytest.mark.parametrize("unread", [(0, 2), (2, 16)])
def test_user_error_is_shown_and_not_retried(pod, unread):
    """Even if exit codes are unreadable at first or when they are evaluated."""
    pod.change_cloud(cat_failures=unread)
    pod.plan("user error")
    output = pod("watch", code=1, SETTLE_SECONDS="3", SILENT_SECONDS="120")
    assert "ConfigError: config.mode is wrong" in output
    assert "the run failed with the exit codes 2, 2" in output
    assert pod.count("create") == 1
    pod.assert_nothing_is_left()


@pytest.mark.slow
def test_launches_without_progress_are_limited(pod):
    pod.set(MAX_TRIES="2")
    pod.plan("preempted", "get nowhere")
    output = pod("watch", code=1)
    assert "2 consecutive launches made no new checkpoint" in output
    assert len(list(pod.bucket.glob("run/launches/*/run-w-0.log"))) == 3
    pod.assert_nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["stop", "delete"])
def test_watch_respects_stop_and_delete_from_elsewhere(pod, verb):
    pod.plan("wait for sigterm")
    watch = pod.start("watch")
    wait_for(pod.cloud / "training-run-w-1")
    pod(verb)
    output, _ = watch.communicate(timeout=90)
    assert watch.returncode == 0 and "run: stopped" in output, output
    assert bool(pod.state()["nodes"]) == (verb == "stop")
    pod.assert_nothing_runs()
    assert pod.count("create") == 1


@pytest.mark.slow
def test_nodes_that_are_hard_to_delete(pod):
    pod.change_cloud(delete_failures=10)
    assert "has finished" in pod("watch")
    pod.assert_nothing_is_left()
    pod("create")
    pod.change_cloud(delete_failures=10)
    assert "MAY STILL COST MONEY: ERROR: (gcloud.compute.tpus" in pod("delete", code=2)
    assert pod.state()["nodes"].keys() == {"run"}
    pod.change_cloud(delete_failures=0)


@pytest.mark.slow
def test_kept_nodes(pod):
    assert "cost money until you delete them" in pod("watch", "--keep")
    assert pod.state()["nodes"].keys() == {"run"}
    pod.assert_nothing_runs()


@pytest.mark.parametrize("verb", ["create", "watch"])
@pytest.mark.parametrize(
    ("settings", "cloud", "message"),
    [
        ({"ZONE": "us-nowhere1-a"}, {}, "there is no v6e-16 in the zone us-nowhere1-a"),
        ({"ZONE": "us-west1-c"}, {}, "there is no v6e-16 in the zone us-west1-c"),
        ({}, {"quota": False}, "there is no quota for v6e-16 (spot) in us-east5-b"),
    ],
)
def test_unavailable_nodes(pod, verb, settings, cloud, message):
    pod.set(**settings)
    pod.change_cloud(**cloud)
    assert message in pod(verb, code=2 if verb == "create" else 1)
    assert pod.count("ssh") == 0
    pod.assert_nothing_is_left()


@pytest.mark.parametrize(("verb", "code"), [("create", 2), ("watch", 1)])
def test_nodes_of_others_are_kept(pod, verb, code):
    pod.change_cloud(nodes={"run": {"state": "READY"}})
    assert "there is a node run in us-east5-b already" in pod(verb, code=code)
    assert pod.state()["nodes"] == {"run": {"state": "READY"}}
    assert pod.count("create") == pod.count("delete") == 0
    pod.change_cloud(nodes={})


def test_a_request_without_a_state_exists(pod):
    pod.change_cloud(queued_resources={"run": {"state": "", "nodes": []}})
    assert "the queued resource run already exists" in pod("create", code=2)
    assert pod.count("create") == 0


def test_failed_requests_are_not_awaited(pod):
    pod.change_cloud(fails_to_come=True)
    assert "the nodes of run were not created (FAILED" in pod("create", code=75)
    pod.assert_nothing_is_left()


@pytest.mark.slow
def test_lost_ssh(pod):
    pod.set(MAX_TRIES="2")
    pod("create")
    pod.change_cloud(ssh_failures=1000)
    output = pod("setup", code=75)
    assert (
        "ssh does not reach all workers" in output
        and "existing nodes of run cost money until" in output
    )
    output = pod("watch", code=1)
    assert "2 consecutive launches made no new checkpoint: it could not be started" in output
    assert pod.count("create") == 2
    pod.change_cloud(ssh_failures=0)
    pod.assert_nothing_is_left()


@pytest.mark.slow
def test_node_that_gcloud_skips(pod):
    pod.set(NUM_SLICES="2")
    pod.change_cloud(devices=32)
    pod("create")
    pod("setup")
    nodes = pod.state()["nodes"]
    for gone in ({"run-1"}, {"run-0", "run-1"}):
        pod.change_cloud(nodes=nodes | {name: {"state": "PREEMPTED"} for name in gone})
        for verb in ("setup", "launch", "stop"):
            assert "ssh does not reach all workers of run" in pod(verb, code=75)
    pod.change_cloud(nodes=nodes)


def test_missing_devices(pod):
    pod("create")
    pod.change_cloud(devices=12)
    assert "found 12 TPU devices, expected 16" in pod("setup", code=2)


def test_launch_before_setup_and_code_that_has_changed(pod):
    assert "some nodes of run do not exist" in pod("launch", code=75)
    (pod.clone / "configs" / "gritlm_7b.py").write_text("changed")
    for verb in ("setup", "launch", "watch"):
        assert " M configs/gritlm_7b.py" in pod(verb, code=2)


def test_setup_uses_this_clone_and_keeps_other_files(pod, tmp_path):
    """Despite other settings in the environment and another run's archive in /tmp."""
    words = ["git", "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.check_output(words, cwd=pod.clone, text=True).strip()
    of_another = tmp_path / "tmp" / f"grit-jax-{commit}.tar.gz"
    of_another.parent.mkdir()
    of_another.write_text("half written")
    pod("create")
    output = pod("setup", TMPDIR=str(of_another.parent), COMMIT="main")
    assert f"{commit} is installed on all workers" in output
    assert of_another.read_text() == "half written"
    assert list(of_another.parent.iterdir()) == [of_another]


def test_missing_bucket(pod):
    pod.set(BUCKET="elsewhere")
    assert "the bucket gs://elsewhere cannot be read" in pod("watch", code=2)
    assert "the bucket gs://elsewhere cannot be written to" in pod("launch", code=2)
    assert pod.count("create") == 0


def test_unreadable_bucket_keeps_no_nodes(pod):
    pod("create")
    pod.set(BUCKET="elsewhere")
    assert "cannot notify a watch on another machine" in pod("delete")
    pod.assert_nothing_is_left()


def test_unwritable_bucket_keeps_no_nodes(pod):
    pod("create")
    (pod.bucket / "run" / "launches" / "20260101T000000Z").mkdir(parents=True)
    (pod.bucket / "run" / "launches" / "20260101T000000Z" / "stopped").mkdir()
    assert "cannot notify a watch on another machine" in pod("delete")
    pod.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PROJECT": ""}, "PROJECT is empty"),
        ({"NAME": "Run_1"}, "NAME=Run_1"),
        ({"BUCKET": "gs://bucket"}, "without gs://"),
        ({"PROVISIONING": "preemptible"}, "spot, reserved or on-demand"),
        ({"NUM_SLICES": "0"}, "NUM_SLICES=0"),
        ({"PRICE_PER_CHIP_HOUR": "$2"}, "PRICE_PER_CHIP_HOUR=$2 in"),
        ({"ACCELERATOR_TYPE": "tpu7x-64"}, "GKE only"),
        ({"CONFIG": "configs/mine.py"}, "git add it"),
    ],
)
def test_invalid_settings(pod, changes, message):
    pod.set(**changes)
    assert message in pod("watch", code=2)
    assert pod.count("create") == 0
    pod.set()


def test_settings_come_from_the_folder_not_from_path(pod):
    (pod.cloud / "bin" / "mine.sh").write_text("exit 3\n")
    settings = (pod.clone / "tpu_scripts" / "settings.sh").read_text()
    (pod.clone / "mine.sh").write_text(settings)
    assert "v6e-16" in pod("create", "--settings", "mine.sh", "--dry-run")


def test_invalid_arguments(pod):
    assert "unknown command 'start'" in pod("start", code=2)
    assert "unknown option '--force'" in pod("create", "--force", code=2)
    assert "there is no other.sh" in pod("create", "--settings", "other.sh", code=2)
    assert "usage: tpu_scripts/pod.sh COMMAND" in pod("--help")
