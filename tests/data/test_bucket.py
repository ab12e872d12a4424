"""Prepared data in a bucket: read over HTTP from a server that answers as Google's storage does."""

import http.server
import os
from pathlib import Path
import re
import subprocess
import sys
import threading
from urllib.parse import unquote, urlsplit

import numpy as np
from prepared_data import chat_examples, write_prepared
import pytest

ROOT = Path(__file__).parents[2]


class Bucket(http.server.BaseHTTPRequestHandler):
    """Serves the objects of a folder; the first few requests fail."""

    protocol_version = "HTTP/1.1"
    folder: Path
    failures: int

    def do_GET(self):
        name = unquote(re.sub(r"^/storage/v1/b/bucket/o/", "", urlsplit(self.path).path))
        if type(self).failures:
            type(self).failures -= 1
            self.answer(503, b"")
        elif not (self.folder / name).is_file():
            self.answer(404, b"")
        else:
            self.answer_with_range((self.folder / name).read_bytes())

    def answer_with_range(self, content):
        asked = re.match(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            self.answer(200, content)
            return
        first, last = asked.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(len(content), int(last) + 1) if first and last else len(content)
        self.answer(206, content[start:stop], f"bytes {start}-{stop - 1}/{len(content)}")

    def answer(self, status, body, part=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-goog-generation", "1")
        if part:
            self.send_header("Content-Range", part)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Says nothing."""


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
        """Clients leave as soon as they have what they want."""


@pytest.fixture
def bucket(tmp_path):
    write_prepared(tmp_path, "chats", chat_examples(np.random.default_rng(0), 3000, 60))
    Bucket.folder, Bucket.failures = tmp_path, 0
    with Server(("localhost", 0), Bucket) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


def read_from(address, script, *arguments):
    """What a process prints for which gs:// is this server."""
    environment = os.environ | {
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
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
from grit_jax.data.manifest import PreparedDataset
from grit_jax.data.storage import PreparedDataError
try:
    PreparedDataset("gs://bucket", "chats", "train")
except PreparedDataError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("failures", [0, 2])
def test_a_bucket_is_read_as_a_folder_is_and_tried_again(bucket, tmp_path, failures):
    Bucket.failures = failures
    assert read_from(bucket, COMPARE, tmp_path, "gs://bucket") == "3000"
    assert Bucket.failures == 0


@pytest.mark.slow
@pytest.mark.parametrize("file", ["manifest.json", "examples-00000.arrayrecord"])
def test_what_is_missing_in_a_bucket_is_named(bucket, tmp_path, file):
    (tmp_path / "chats" / "train" / file).unlink()
    message = read_from(bucket, MISSING)
    assert message.startswith(f"gs://bucket/chats/train/{file} does not exist")
