"""Prepared data in a bucket, read over HTTP from a server that imitates Google Cloud Storage."""

import os
from pathlib import Path
import subprocess
import sys

import numpy as np
from prepared_data import chat_examples, write_prepared
import pytest
from storage_server import StorageServer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bucket(tmp_path):
    write_prepared(tmp_path, "chats", chat_examples(np.random.default_rng(0), 3000, 60))
    with StorageServer() as server:
        server.put_folder(tmp_path, "")
        yield server


def read_from(bucket, script, *arguments):
    """Returns the output of a process for which gs:// is this server."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    finished = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | bucket.environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


COMPARE = """
import sys
from grit_jax.data.manifest import PreparedDataset
local, remote = (PreparedDataset(folder, "chats", "train") for folder in sys.argv[1:])
for ours, theirs in zip(local.read([2999, 5, 700]), remote.read([2999, 5, 700]), strict=True):
    assert (ours.chat.tokens == theirs.chat.tokens).all()
assert (local.lengths.fingerprints == remote.lengths.fingerprints).all()
assert "tensorflow" not in sys.modules
print(len(remote))
"""

MISSING = """
import sys
from grit_jax.data.manifest import PreparedDataset
from grit_jax.data.storage import PreparedDataError
for folder in sys.argv[1:]:
    try:
        PreparedDataset(folder, "chats", "train")
    except PreparedDataError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_bucket_is_read_like_a_folder_with_retries(bucket, tmp_path):
    bucket.failures = 2
    assert read_from(bucket, COMPARE, tmp_path, "gs://bucket") == "3000"
    assert bucket.failures == 0


@pytest.mark.slow
def test_a_missing_object_is_named(bucket, tmp_path):
    bucket.put_folder(tmp_path, "second")
    missing = ["chats/train/manifest.json", "second/chats/train/examples-00000.arrayrecord"]
    for name in missing:
        del bucket.objects[name]
    messages = read_from(bucket, MISSING, "gs://bucket", "gs://bucket/second").splitlines()
    for message, name in zip(messages, missing, strict=True):
        assert message.startswith(f"gs://bucket/{name} does not exist")
