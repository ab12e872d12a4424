"""A fake Google Cloud Storage server with one bucket in memory, gs://bucket.

It implements the requests of tensorstore, gcsfs, google-cloud-storage and ArrayRecord, including
conditions on the generation of an object. Requests can be made to fail.
"""

import base64
import email
import http.server
import itertools
import json
import os
from pathlib import Path
import re
import threading
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

PERMISSIONS = {f"storage.objects.{verb}" for verb in ("create", "delete", "get", "list")}


class StorageServer(http.server.ThreadingHTTPServer):
    """A server, and a context manager in which it runs.

    Attributes:
      objects: content and generation of each object, by name.
      failures: number of further requests to answer with 503.
      permissions: the caller's permissions on objects.
      can_get_bucket: whether the caller may read the metadata of the bucket.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("localhost", 0), _Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.failures = 0
        self.permissions = set(PERMISSIONS)
        self.can_get_bucket = True
        self.lock = threading.RLock()
        self.generations = itertools.count(1)
        self.uploads: dict[str, tuple[str, bytearray]] = {}

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        """Ignores clients that close the connection early."""

    @property
    def environment(self):
        """Environment variables that make the libraries of a process use this server for gs://."""
        address = f"http://localhost:{self.server_port}"
        return {
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,  # ArrayRecord
            "STORAGE_EMULATOR_HOST": address,  # gcsfs, google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GOOGLE_CLOUD_PROJECT": "project",
            "NO_GCE_CHECK": "true",
        }

    def put_folder(self, folder, name):
        """Copies the files of a local folder into the folder `name` of the bucket."""
        for path in Path(folder).rglob("*"):
            if path.is_file():
                key = os.path.join(name, path.relative_to(folder))
                self.objects[key] = (path.read_bytes(), next(self.generations))

    def names(self, prefix=""):
        """The names of the objects that begin with `prefix`, without the prefix."""
        with self.lock:
            return {n.removeprefix(prefix) for n in self.objects if n.startswith(prefix)}

    def read(self, name):
        """The content of an object, b"" if there is none."""
        with self.lock:
            return self.objects.get(name, (b"", 0))[0]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StorageServer
    disable_nagle_algorithm = True

    def do_GET(self):
        self.handle_one()

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *_):
        """Logs nothing."""

    def handle_one(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        body = self.read_body()
        with self.server.lock:
            if self.server.failures:
                self.server.failures -= 1
                return self.fail(503, "for a moment")
            for method, pattern, answer, permission in ROUTES:
                found = re.fullmatch(pattern, url.path)
                if found and method == self.command:
                    if permission and permission not in self.server.permissions:
                        return self.fail(403, f"the caller does not have {permission} access")
                    if found["bucket"] != "bucket":
                        return self.fail(404, "The specified bucket does not exist.")
                    return answer(self, body, *map(unquote, found.groups()[1:]))
        return self.fail(501, f"{self.command} {self.path}")

    def read_body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # The answer to each route, with the groups of the route's pattern as arguments.

    def get_bucket(self, body):
        if not self.server.can_get_bucket:
            return self.fail(403, "the caller does not have storage.buckets.get access")
        return self.send_json({"kind": "storage#bucket", "id": "bucket", "name": "bucket"})

    def test_permissions(self, body):
        asked = set(self.query.get("permissions", ()))
        return self.send_json({"permissions": sorted(asked & self.server.permissions)})

    def list_objects(self, body):
        prefix, delimiter = self.one("prefix", ""), self.one("delimiter", "")
        first, end = self.one("startOffset", ""), self.one("endOffset", "")
        after, most = self.one("pageToken", ""), int(self.one("maxResults", "1000"))
        items, prefixes = [], []
        for name in sorted(self.server.objects):
            if not name.startswith(prefix) or name < first or (end and name >= end):
                continue
            folder, found, _ = name[len(prefix) :].partition(delimiter or "/")
            entry = f"{prefix}{folder}/" if delimiter and found else name
            if entry <= after or entry in prefixes:
                continue
            if len(items) + len(prefixes) == most:
                token = {"nextPageToken": max(prefixes[-1:] + items[-1:])}
                break
            (items if entry == name else prefixes).append(entry)
        else:
            token = {}
        listed = [self.describe(name) for name in items]
        return self.send_json({"items": listed, "prefixes": prefixes, **token})

    def get_object(self, body, name):
        if name not in self.server.objects:
            return self.fail(404, f"No such object: bucket/{name}")
        content, generation = self.server.objects[name]
        if not self.condition_holds(generation):
            return self.fail(304 if self.one("ifGenerationNotMatch", "") else 412, "condition")
        # ArrayRecord sends no `alt` and expects the content.
        if self.one("alt", "media" if self.headers.get("Range") else "json") == "json":
            return self.send_json(self.describe(name))
        return self.send_content(content, generation)

    def insert(self, body):
        kind = self.one("uploadType", "media")
        if kind == "resumable":
            name = self.one("name", None) or json.loads(body)["name"]
            number = str(next(self.server.generations))
            self.server.uploads[number] = (name, bytearray())
            address = f"http://{self.headers['Host']}{self.path}&upload_id={number}"
            return self.send(200, b"", Location=address)
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            described, content = email.message_from_bytes(head + body).get_payload()
            boundary = re.search(r'boundary="?([^"]+)"?', self.headers["Content-Type"])[1]
            raw = body.split(b"--" + boundary.encode())[2]
            raw = re.split(rb"\r?\n\r?\n", raw, maxsplit=1)[1]
            content = raw.removesuffix(b"\n").removesuffix(b"\r")
            return self.put(json.loads(described.get_payload())["name"], content)
        return self.put(self.one("name", ""), body)

    def resume(self, body):
        number = self.one("upload_id", "")
        name, content = self.server.uploads[number]
        content += body
        if self.headers["Content-Range"].endswith("/*"):
            return self.send(308, b"", Range=f"bytes=0-{len(content) - 1}")
        del self.server.uploads[number]
        return self.put(name, bytes(content))

    def upload(self, body):
        return self.resume(body) if "upload_id" in self.query else self.insert(body)

    def move(self, body, source, target):
        if source not in self.server.objects:
            return self.fail(404, f"No such object: bucket/{source}")
        content, _ = self.server.objects.pop(source)
        return self.put(target, content)

    def delete(self, body, name):
        status = self.remove(name)
        return self.send(204, b"") if status == 204 else self.fail(status, f"No such object {name}")

    # Helpers of the answers.

    def one(self, name, default):
        return self.query.get(name, [default])[0]

    def condition_holds(self, generation):
        wanted, unwanted = self.one("ifGenerationMatch", ""), self.one("ifGenerationNotMatch", "")
        return (not wanted or int(wanted) == generation) and (
            not unwanted or int(unwanted) != generation
        )

    def put(self, name, content):
        _, generation = self.server.objects.get(name, (b"", 0))
        if generation and "storage.objects.delete" not in self.server.permissions:
            return self.fail(403, "the caller does not have storage.objects.delete access")
        if not self.condition_holds(generation):
            return self.fail(412, "At least one of the pre-conditions you specified did not hold.")
        self.server.objects[name] = (content, next(self.server.generations))
        return self.send_json(self.describe(name))

    def remove(self, name):
        if name not in self.server.objects:
            return 404
        if not self.condition_holds(self.server.objects[name][1]):
            return 412
        del self.server.objects[name]
        return 204

    def describe(self, name):
        content, generation = self.server.objects[name]
        checksum = google_crc32c.Checksum(content).digest()
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": "bucket",
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "crc32c": base64.b64encode(checksum).decode(),
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def send_content(self, content, generation):
        headers = {"x-goog-generation": str(generation)}
        asked = re.match(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self.send(200, content, **headers)
        first, last = asked.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(len(content), int(last) + 1) if first and last else len(content)
        if start >= len(content):
            return self.fail(416, "The requested range cannot be satisfied.")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self.send(206, content[start:stop], **headers)

    def send_json(self, content):
        return self.send(200, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def fail(self, status, message):
        content = {"error": {"code": status, "message": message}}
        return self.send(status, json.dumps(content).encode() if status != 304 else b"")

    def send(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


# Some libraries leave out /storage/v1 for an emulator.
_BUCKET = r"(?:/storage/v1)?/b/(?P<bucket>[^/]+)"
ROUTES = (
    ("GET", _BUCKET, _Handler.get_bucket, None),
    ("GET", _BUCKET + "/iam/testPermissions", _Handler.test_permissions, None),
    ("GET", _BUCKET + "/o", _Handler.list_objects, "storage.objects.list"),
    ("GET", r"(?:/download)?" + _BUCKET + "/o/(.+)", _Handler.get_object, "storage.objects.get"),
    ("DELETE", _BUCKET + "/o/(.+)", _Handler.delete, "storage.objects.delete"),
    ("POST", _BUCKET + "/o/(.+)/moveTo/o/(.+)", _Handler.move, "storage.objects.delete"),
    ("POST", "/upload" + _BUCKET + "/o", _Handler.upload, "storage.objects.create"),
    ("PUT", "/upload" + _BUCKET + "/o", _Handler.upload, "storage.objects.create"),
)
