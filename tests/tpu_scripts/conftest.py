"""A clone with tpu_scripts, and a fake Google Cloud in a folder: gcloud.py, worker_tools.py."""

import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import time

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SETTINGS = {
    "PROJECT": "project",
    "ZONE": "us-east5-b",
    "NAME": "run",
    "BUCKET": "bucket",
    "ACCELERATOR_TYPE": "v6e-16",
    "PROVISIONING": "spot",
    "CONFIG": "configs/gritlm_7b.py",
    "WEIGHTS": "gs://bucket/weights",
    "OVERRIDES": "(--config.data.folder=gs://bucket/data '--config.data.embedding=words (2)')",
}
QUICK = {
    "POLL_SECONDS": "0.1",
    "LOG_SECONDS": "0.2",
    "SETTLE_SECONDS": "2",
    "SILENT_SECONDS": "60",
    "STOP_SECONDS": "20",
}


class Pod:
    """Runs pod.sh in a clone, and gives access to the fake cloud."""

    def __init__(self, folder: Path):
        self.clone = folder / "clone"
        self.cloud = folder / "cloud"
        self.bucket = self.cloud / "buckets" / "bucket"
        (self.bucket / "weights").mkdir(parents=True)
        (self.bucket / "weights" / "config.json").write_text("{}")
        self.change_cloud(
            zones={"us-east5-b": ["v6e-16"], "us-west1-c": []},
            devices=16,
            quota=True,
            fails_to_come=False,
            ssh_failures=0,
            delete_failures=0,
            cats=0,
            cat_failures=[0, 0],
            queued_resources={},
            nodes={},
        )
        self.plan("finish")
        gcloud = f'exec {sys.executable} -S {HERE / "gcloud.py"} "$@"'
        python = f'exec {sys.executable} -S {HERE / "worker_tools.py"} python3.12 "$@"'
        write_program(self.cloud / "bin" / "gcloud", gcloud)
        write_program(self.cloud / "worker_bin" / "hostname", 'echo "$WORKER"')
        write_program(self.cloud / "worker_bin" / "python3.12", python)
        self.make_clone()
        self.set()

    def make_clone(self):
        for name in ("tpu_scripts", "configs"):
            shutil.copytree(ROOT / name, self.clone / name)
        shutil.copy(ROOT / "constraints.txt", self.clone)
        (self.clone / "tpu_scripts" / "settings.sh").unlink(missing_ok=True)
        (self.clone / ".gitignore").write_text("settings.sh\n")
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
        for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "all"]):
            subprocess.run(["git", *words], cwd=self.clone, check=True)

    def set(self, **changes):
        """Writes the settings file with changes."""
        settings = SETTINGS | changes
        lines = [f"{k}={v if v[:1] == '(' else repr(v)}\n" for k, v in settings.items()]
        (self.clone / "tpu_scripts" / "settings.sh").write_text("".join(lines))

    def change_cloud(self, **changes):
        path = self.cloud / "cloud.json"
        state = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(state | changes))

    def plan(self, *acts):
        """Sets the outcome of training for each launch; the last one repeats."""
        (self.cloud / "plan.json").write_text(json.dumps(acts))

    def start(self, *arguments, **environment):
        """Starts `pod.sh ...` without waiting for it."""
        path = f"{self.cloud / 'bin'}:{os.environ['PATH']}"
        environment = os.environ | QUICK | {"CLOUD": str(self.cloud), "PATH": path} | environment
        return subprocess.Popen(
            ["tpu_scripts/pod.sh", *arguments],
            cwd=self.clone,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *arguments, code=0, **environment):
        """Runs `pod.sh ...` and returns its output."""
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=180)
        assert process.returncode == code, output
        return output

    def calls(self, *words):
        """Returns the gcloud calls that start with `words`."""
        path = self.cloud / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for line in lines if (call := json.loads(line))[: len(words)] == [*words]]

    def count(self, verb):
        return len(self.calls("compute", "tpus", "queued-resources", verb))

    def steps(self):
        lines = (self.bucket / "run/run/metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    def state(self):
        return json.loads((self.cloud / "cloud.json").read_text())

    def assert_nothing_is_left(self):
        assert self.state()["queued_resources"] == {}
        assert self.state()["nodes"] == {}
        self.assert_nothing_runs()

    def assert_nothing_runs(self):
        deadline = time.monotonic() + 60
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert self.processes() == []

    def processes(self):
        """Returns the command lines of the processes on the workers."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().decode().split("\0")
                if f"CLOUD={self.cloud}" in environment and "WORKER=" in "\n".join(environment):
                    found.append((process / "cmdline").read_bytes().decode())
            except OSError:
                continue
        return found


def write_program(path, command):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)


@pytest.fixture
def pod(tmp_path):
    pod = Pod(tmp_path)
    yield pod
    pod("delete")
    pod.assert_nothing_is_left()
