"""A bucket that cannot be used is named in one line, with what to do."""

import os
import subprocess
import sys

from command_line import ROOT, assert_fails_in_one_line, environment
import pytest
from small_run import SMALL
from storage_server import StorageServer

OPEN = """
import sys
from grit_jax.bucket import BucketError, check_writing, open_bucket
sys.modules |= {name: None for name in sys.argv[2:]}  # Those are not installed.
try:
    check_writing(open_bucket(sys.argv[1]))
except BucketError as error:
    print(error)
"""


@pytest.fixture
def server():
    with StorageServer() as server:
        yield server


def ask(*arguments, **settings):
    """Opens a bucket in a process, and returns the error message."""
    finished = subprocess.run(
        [sys.executable, "-c", OPEN, *arguments],
        env=environment() | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_a_bucket_that_can_be_used_is_found_at_the_third_try(server):
    server.failures = 2
    assert ask("gs://bucket/run", **server.environment) == ""
    assert not server.failures


def test_what_is_wrong_with_a_bucket_is_named(server, tmp_path):
    message = ask("gs://other/run", **server.environment)
    assert message == "gs://other cannot be used: it does not exist"
    assert "names no bucket" in ask("gs://", **server.environment)
    message = ask("gs://bucket/run", "gcsfs")
    assert message == "gs://bucket/run needs the package gcsfs: pip install 'grit-jax[bucket]'"
    nobody = {"CLOUDSDK_CONFIG": str(tmp_path), "HOME": str(tmp_path), "NO_GCE_CHECK": "true"}
    assert "gcloud auth application-default login" in ask("gs://bucket/run", **nobody)
    server.can_get_bucket = False
    message = ask("gs://bucket/run", **server.environment)
    assert message.startswith("gs://bucket cannot be used: ")
    assert "storage.buckets.get" in message


@pytest.mark.slow
def test_a_run_that_may_not_replace_its_files_is_not_begun(server, prepared_sample):
    server.permissions.remove("storage.objects.delete")
    fields = [*SMALL, f"--config.data.folder={prepared_sample}", "--workdir=gs://bucket/run"]
    finished = subprocess.run(
        [sys.executable, "train.py", *fields],
        cwd=ROOT,
        env=os.environ | server.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert_fails_in_one_line(finished, "BucketError", "gs://bucket", "storage.objects.delete")
    assert not server.names()
