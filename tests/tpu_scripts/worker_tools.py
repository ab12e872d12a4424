"""Fake tools of a worker besides gcloud: Python, pip, and `grit-jax train`.

The environment variable CLOUD names the folder of the fake cloud. Its `plan.json` contains the
outcome of training for each launch.
"""

import json
import os
from pathlib import Path
import signal
import sys
import time

CLOUD = Path(os.environ["CLOUD"])
WORKER = os.environ.get("WORKER", "")
LAST_STEP = 6


def venv(arguments: list[str]) -> None:
    assert arguments[:2] == ["-m", "venv"], arguments
    folder = Path(arguments[2]) / "bin"
    folder.mkdir(parents=True)
    for tool in ("pip", "python", "grit-jax"):
        command = f'exec {sys.executable} -S {__file__} {tool} "$@"'
        (folder / tool).write_text(f"#!/bin/sh\n{command}\n")
        (folder / tool).chmod(0o755)


def pip(arguments: list[str]) -> None:
    with (CLOUD / "installs").open("a") as installs:
        installs.write(" ".join([WORKER, *arguments]) + "\n")
    if not Path("constraints.txt").exists():
        sys.exit("there is no constraints.txt")


def python(arguments: list[str]) -> None:
    devices = json.loads((CLOUD / "cloud.json").read_text())["devices"]
    assert Path(arguments[0]).exists()
    if arguments[1] != str(devices):
        sys.exit(f"{WORKER}: found {devices} TPU devices, expected {arguments[1]}")


def train(arguments: list[str]) -> None:
    """Makes two steps, then follows the plan; "finish" makes all steps."""
    assert arguments[0] == "train"
    options = dict(zip(arguments[1:5:2], arguments[2:5:2], strict=True))
    assert Path(options["--config"]).exists()
    run = CLOUD / "buckets" / options["--workdir"].removeprefix("gs://")
    print("arguments:", *arguments, flush=True)
    plan = json.loads((CLOUD / "plan.json").read_text())
    launch = Path("../run/launch").read_text().strip().rpartition("/")[2]
    launches = sorted({log.parent.name for log in run.parent.glob("launches/*/*.log")})
    act = plan[min(launches.index(launch), len(plan) - 1)]
    are_made = CLOUD / f"steps-of-{launch}"
    if is_primary():
        count = LAST_STEP if act == "finish" else newest(run) + 2 * (act != "get nowhere")
        make_steps(run, count)
        are_made.touch()
    while not are_made.exists():
        time.sleep(0.05)
    globals()[act.replace(" ", "_")]()


def newest(run: Path) -> int:
    return max((int(path.name) for path in run.glob("checkpoints/[0-9]*")), default=0)


def make_steps(run: Path, last: int) -> None:
    for step in range(newest(run) + 1, last + 1):
        (run / "checkpoints" / str(step)).mkdir(parents=True)
        with (run / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps({"step": step}) + "\n")


def is_primary() -> bool:
    return WORKER.endswith("-w-0") and not WORKER.endswith("-1-w-0")


def write_whole(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.{WORKER}")  # Both workers may write this file.
    aside.write_text(text)
    aside.replace(path)


def finish() -> None:
    sys.exit(0)


def preempted() -> None:
    write_whole(CLOUD / "preempt", "SUSPENDED")
    time.sleep(600)


def preempted_with_a_crash() -> None:
    """The remaining workers fail, and only the node states show the preemption."""
    if is_primary():
        time.sleep(1)
        write_whole(CLOUD / "preempt", "ACTIVE")
        time.sleep(600)
    raise RuntimeError("a peer is gone")


def get_nowhere() -> None:
    os.kill(os.getpid(), signal.SIGABRT)


def lose_a_worker() -> None:
    """JAX ends the other workers with SIGABRT."""
    os.kill(os.getpid(), signal.SIGABRT if is_primary() else signal.SIGKILL)


def vanish() -> None:
    """All processes of one worker end, as after a reboot, and the others wait."""
    if is_primary():
        wait_for_sigterm()
    os.killpg(os.getpgid(0), signal.SIGKILL)


def user_error() -> None:
    print("ConfigError: config.mode is wrong", file=sys.stderr)
    sys.exit(2)


def wait_for_sigterm() -> None:
    def save(number, frame):
        sys.exit(75)

    signal.signal(signal.SIGTERM, save)
    (CLOUD / f"training-{WORKER}").touch()
    time.sleep(600)


if __name__ == "__main__":
    tools = {"python3.12": venv, "pip": pip, "python": python, "grit-jax": train}
    tools[sys.argv[1]](sys.argv[2:])
