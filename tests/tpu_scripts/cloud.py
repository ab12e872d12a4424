"""State of the fake cloud: a folder with resources, machines and faults.

Its `cloud.json` contains zones, quota, faults, queued resources and nodes. The environment variable
CLOUD names the folder.
"""

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
from pathlib import Path
import shutil
import signal
import sys

CLOUD = Path(os.environ["CLOUD"])


def fail(command: str, message: str, code: int = 1):
    print(f"ERROR: (gcloud.{command.replace(' ', '.')}) {message}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def cloud() -> Iterator[dict]:
    """Yields the state of the cloud under a lock."""
    with (CLOUD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = json.loads((CLOUD / "cloud.json").read_text())
        if (CLOUD / "preempt").exists():
            preempt(state, (CLOUD / "preempt").read_text())
            (CLOUD / "preempt").unlink()
        yield state
        (CLOUD / "cloud.json").write_text(json.dumps(state, indent=1))


def preempt(state: dict, resource_state: str) -> None:
    for resource in state["queued_resources"].values():
        resource["state"] = resource_state
    for name, node in state["nodes"].items():
        node["state"] = "PREEMPTED"
        remove_machines(name)


def remove_machines(node: str) -> None:
    for home in (CLOUD / "workers").glob(f"{node}-w-*"):
        while processes := processes_of(home.name):  # A process may just have started another.
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)


def processes_of(worker: str = "") -> list[int]:
    """Returns the processes of a worker, or of all workers."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (entry / "environ").read_bytes().split(b"\0")
            is_here = f"CLOUD={CLOUD}".encode() in environment
            if is_here and any(v.startswith(f"WORKER={worker}".encode()) for v in environment):
                found.append(int(entry.name))
    return found
