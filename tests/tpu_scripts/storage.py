"""Fake `gcloud storage`: a bucket is a folder."""

import argparse
import os
from pathlib import Path
import shutil
import sys
import time

from cloud import CLOUD, cloud, fail


def local(url: str) -> Path:
    """Returns the local path of an object whose bucket exists."""
    path = CLOUD / "buckets" / url.removeprefix("gs://")
    bucket = CLOUD / "buckets" / url.removeprefix("gs://").split("/")[0]
    if not bucket.is_dir():
        fail("storage", f"HTTPError 404: The specified bucket does not exist: {bucket.name}")
    return path


def matches(url: str) -> list[Path]:
    path = local(url)
    found = sorted(path.parent.glob(path.name)) if "*" in url else [path]
    if not all(one.exists() for one in found) or not found:
        fail("storage", "One or more URLs matched no objects.")
    return found


def copy(arguments: argparse.Namespace) -> None:
    data = (
        sys.stdin.buffer.read() if arguments.source == "-" else Path(arguments.source).read_bytes()
    )
    target = local(arguments.destination)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Objects are written atomically.
    aside = CLOUD / f"upload-{os.getpid()}"
    aside.write_bytes(data)
    aside.replace(target)


def cat(arguments: argparse.Namespace) -> None:
    is_lost = False
    if arguments.url.endswith("*.exit_code"):
        with cloud() as state:
            is_lost = state["cats"] in range(*state["cat_failures"])
            state["cats"] += 1
    if is_lost:
        fail("storage.cat", "HTTPError 503: We encountered an internal error. Please try again.")
    for path in matches(arguments.url):
        sys.stdout.buffer.write(path.read_bytes())


def list_objects(arguments: argparse.Namespace) -> None:
    for path in matches(arguments.url):
        for one in sorted(path.iterdir()) if path.is_dir() else [path]:
            url = f"gs://{one.relative_to(CLOUD / 'buckets')}" + ("/" if one.is_dir() else "")
            if arguments.long and one.is_file():
                changed = one.stat().st_mtime_ns
                moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(changed // 10**9))
                print(f"  {one.stat().st_size:10}  {moment}.{changed % 10**9:09}Z  {url}")
            else:
                print(url)


def rsync(arguments: argparse.Namespace) -> None:
    folders = [
        local(path) if path.startswith("gs://") else path
        for path in (arguments.source, arguments.destination)
    ]
    if arguments.delete_unmatched_destination_objects:
        shutil.rmtree(folders[1])
    shutil.copytree(*folders, dirs_exist_ok=True)


def create_bucket(arguments: argparse.Namespace) -> None:
    (CLOUD / "buckets" / arguments.url.removeprefix("gs://")).mkdir(parents=True)


def add_right(arguments: argparse.Namespace) -> None:
    local(arguments.url)
    print(f"{arguments.member} has {arguments.role}")


def copy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("--quiet", action="store_true")


def list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url")
    parser.add_argument("--long", action="store_true")


def rsync_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("--recursive", action="store_true", required=True)
    parser.add_argument("--delete-unmatched-destination-objects", action="store_true")


def bucket_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url")
    parser.add_argument("--project", required=True)
    parser.add_argument("--location", required=True)


def right_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url")
    parser.add_argument("--role", required=True)
    parser.add_argument("--member", required=True)


COMMANDS = {
    "storage buckets create": (create_bucket, bucket_arguments),
    "storage buckets add-iam-policy-binding": (add_right, right_arguments),
    "storage cp": (copy, copy_arguments),
    "storage cat": (cat, lambda parser: parser.add_argument("url")),
    "storage ls": (list_objects, list_arguments),
    "storage rsync": (rsync, rsync_arguments),
}
