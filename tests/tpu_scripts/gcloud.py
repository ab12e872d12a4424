"""Fake gcloud: nodes are folders with processes (cloud.py), buckets are folders.

Flags that gcloud does not have, or that pod.sh does not use, are errors.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys

from cloud import CLOUD, cloud, fail, remove_machines
import storage

WORKERS_OF_A_NODE = 2


def main() -> None:
    words = sys.argv[1:]
    with (CLOUD / "calls").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    for name, (run, add_arguments) in COMMANDS.items():
        if words[: len(name.split())] == name.split():
            parser = argparse.ArgumentParser(prog=f"gcloud {name}", allow_abbrev=False)
            add_arguments(parser)
            run(parser.parse_args(words[len(name.split()) :]))
            return
    fail("", f"Invalid choice: {words}")


def check_zone(command: str, state: dict, zone: str) -> None:
    if zone not in state["zones"]:
        fail(command, f"NOT_FOUND: Location {zone} is not found or access is unauthorized.")


def create(arguments: argparse.Namespace) -> None:
    command = "compute tpus queued-resources create"
    with cloud() as state:
        check_zone(command, state, arguments.zone)
        if not state["quota"]:
            limit = "TPUV6EPreemptiblePerProjectPerZoneForTPUAPI"
            message = f"Quota limit '{limit}' has been exceeded. Limit: 0 in {arguments.zone}."
            fail(command, f"RESOURCE_EXHAUSTED: {message}")
        if arguments.name in state["queued_resources"]:
            fail(command, f"ALREADY_EXISTS: Resource '{arguments.name}' already exists")
        count, prefix = arguments.node_count, arguments.node_prefix
        nodes = [f"{prefix}-{i}" for i in range(count)] if count else [arguments.node_id]
        resource = {"state": "WAITING_FOR_RESOURCES", "nodes": nodes, "flags": vars(arguments)}
        state["queued_resources"][arguments.name] = resource


def describe(arguments: argparse.Namespace) -> None:
    command = "compute tpus queued-resources describe"
    with cloud() as state:
        check_zone(command, state, arguments.zone)
        if arguments.name not in state["queued_resources"]:
            fail(command, f"NOT_FOUND: Resource '{arguments.name}' was not found")
        resource = state["queued_resources"][arguments.name]
        print(resource["state"])
        # Simulates the passing of time.
        if resource["state"] == "WAITING_FOR_RESOURCES":
            resource["state"] = "FAILED" if state["fails_to_come"] else "PROVISIONING"
        elif resource["state"] == "PROVISIONING":
            resource["state"] = "ACTIVE"
            for name in resource["nodes"]:
                state["nodes"][name] = {"state": "READY"}
                for number in range(WORKERS_OF_A_NODE):
                    (CLOUD / "workers" / f"{name}-w-{number}").mkdir(parents=True)


def delete(arguments: argparse.Namespace) -> None:
    command = "compute tpus queued-resources delete"
    with cloud() as state:
        resource = state["queued_resources"].get(arguments.name)
        if resource is None:
            fail(command, f"NOT_FOUND: Resource '{arguments.name}' was not found")
        elif resource["state"] == "ACTIVE" and not arguments.force:
            fail(command, "FAILED_PRECONDITION: it has nodes")
        is_lost = state["delete_failures"] > 0
        state["delete_failures"] -= is_lost
        for name in () if is_lost else resource["nodes"]:
            if state["nodes"].pop(name, None):
                remove_machines(name)
        if not is_lost:
            del state["queued_resources"][arguments.name]
    if is_lost:
        fail(command, "INTERNAL: an internal error has occurred")


def describe_node(arguments: argparse.Namespace) -> None:
    with cloud() as state:
        if arguments.name not in state["nodes"]:
            fail("compute tpus tpu-vm describe", f"NOT_FOUND: '{arguments.name}' was not found")
        print(state["nodes"][arguments.name]["state"])


def describe_type(arguments: argparse.Namespace) -> None:
    command = "compute tpus tpu-vm accelerator-types describe"
    with cloud() as state:
        check_zone(command, state, arguments.zone)
        if arguments.name not in state["zones"][arguments.zone]:
            fail(command, f"NOT_FOUND: acceleratorTypes/{arguments.name} was not found")
    print(arguments.name)


def ssh(arguments: argparse.Namespace) -> None:
    """Runs the command on all workers at once, each with its own home and environment."""
    command = "compute tpus queued-resources ssh"
    with cloud() as state:
        resource = state["queued_resources"].get(arguments.name)
        if resource is None:
            fail(command, f"NOT_FOUND: Resource '{arguments.name}' was not found")
        nodes = [
            name for name in resource["nodes"] if state["nodes"].get(name) == {"state": "READY"}
        ]
        if len(nodes) < (count := len(resource["nodes"])):  # gcloud only warns.
            warning = f"Could not prepare all {count} nodes, attempting to ssh into the rest."
            print(f"WARNING: {warning}", file=sys.stderr)
        is_lost = state["ssh_failures"] > 0
        state["ssh_failures"] -= is_lost
    names = [f"{node}-w-{number}" for node in nodes for number in range(WORKERS_OF_A_NODE)]
    started = [start(name, arguments.command) for name in names[: len(names) - is_lost]]
    codes = []
    for process in started:
        # Like ssh, waits until no process holds the output; a session must close it.
        output, _ = process.communicate(timeout=60)
        sys.stdout.write(output)
        # Processes in the shell's session end with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        codes.append(process.returncode)
    if is_lost:
        fail(command, f"[{names[-1]}] Connection timed out", 255)
    sys.exit(next((code for code in codes if code), 0))


def start(worker: str, command: str) -> subprocess.Popen:
    home = CLOUD / "workers" / worker
    environment = {
        "CLOUD": str(CLOUD),
        "HOME": str(home),
        "PATH": f"{CLOUD}/worker_bin:{os.environ['PATH']}",
        "WORKER": worker,
    }
    return subprocess.Popen(
        ["bash", "-c", command],
        cwd=home,
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def resource_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", required=True)


def describe_arguments(answer: str):
    def add(parser: argparse.ArgumentParser) -> None:
        resource_arguments(parser)
        parser.add_argument("--format", choices=[answer, "yaml(state)"], required=True)

    return add


def create_arguments(parser: argparse.ArgumentParser) -> None:
    resource_arguments(parser)
    parser.add_argument("--accelerator-type", required=True)
    parser.add_argument("--runtime-version", required=True)
    one_or_more = parser.add_mutually_exclusive_group(required=True)
    one_or_more.add_argument("--node-id")
    one_or_more.add_argument("--node-count", type=int, choices=range(2, 100))
    parser.add_argument("--node-prefix")
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--reserved", action="store_true")
    parser.add_argument("--valid-until-duration")
    parser.add_argument("--service-account")


def delete_arguments(parser: argparse.ArgumentParser) -> None:
    resource_arguments(parser)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--quiet", action="store_true", required=True)  # Otherwise it asks.


def ssh_arguments(parser: argparse.ArgumentParser) -> None:
    resource_arguments(parser)
    for name in ("node", "worker", "batch-size"):
        parser.add_argument(f"--{name}", choices=["all"], required=True)
    parser.add_argument("--command", required=True)
    parser.add_argument("--quiet", action="store_true", required=True)
    parser.add_argument("--tunnel-through-iap", action="store_true")


def log_in(arguments: argparse.Namespace) -> None:
    """Does nothing: the fake is always logged in."""


def enable(arguments: argparse.Namespace) -> None:
    assert all(service.endswith(".googleapis.com") for service in arguments.services)


def describe_project(arguments: argparse.Namespace) -> None:
    """Prints the same project number for every project."""
    print(1234567890)


def enable_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("services", nargs="+")
    parser.add_argument("--project", required=True)


def project_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("project")
    parser.add_argument("--format", choices=["value(projectNumber)"], required=True)


COMMANDS = {
    "auth login": (log_in, lambda parser: None),
    "auth application-default login": (log_in, lambda parser: None),
    "services enable": (enable, enable_arguments),
    "projects describe": (describe_project, project_arguments),
    "compute tpus queued-resources create": (create, create_arguments),
    "compute tpus queued-resources describe": (describe, describe_arguments("value(state.state)")),
    "compute tpus queued-resources delete": (delete, delete_arguments),
    "compute tpus queued-resources ssh": (ssh, ssh_arguments),
    "compute tpus tpu-vm describe": (describe_node, describe_arguments("value(state)")),
    "compute tpus tpu-vm accelerator-types describe": (
        describe_type,
        describe_arguments("value(type)"),
    ),
    **storage.COMMANDS,
}

if __name__ == "__main__":
    main()
