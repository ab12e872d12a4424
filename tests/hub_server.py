"""A stand-in for the Hugging Face Hub: what huggingface_hub calls to push and load a model."""

import base64
import contextlib
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import threading

COMMIT = "1" * 40
TOKEN = "hf_token"


@contextlib.contextmanager
def serve_hub():
    """Yields a server with `url`, `models` (name -> path -> content) and `visibility`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.models, server.visibility, server.large = {}, {}, {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, content=b"", status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def chunks(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.body()
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_PUT(self):
        content = self.chunks()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer()

    def do_POST(self):
        content, path = self.chunks(), self.path.split("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            fields = json.loads(content)
            name = f"{fields['organization']}/{fields['name']}"
            self.server.models.setdefault(name, {})
            self.server.visibility[name] = fields.get("visibility")
            self.answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            self.answer({"files": [upload_mode(file) for file in json.loads(content)["files"]]})
        elif path.endswith("/info/lfs/objects/batch"):
            self.answer(
                {
                    "transfer": "basic",
                    "objects": [
                        {**o, "actions": {"upload": {"href": f"{self.server.url}/{o['oid']}"}}}
                        for o in json.loads(content)["objects"]
                    ],
                },
            )
        elif "/commit/" in path:
            self.commit("/".join(path.split("/")[3:5]), content)
        else:
            self.answer({"error": f"unknown {path}"}, 404)

    def commit(self, name, content):
        files = self.server.models[name]
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        url = f"{self.server.url}/{name}/commit/{COMMIT}"
        self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.models.get(name)
        if files is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif parts[0] == "api" and "tree" in parts:
            self.answer(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": oid(content)}
                    for path, content in files.items()
                ]
            )
        elif parts[0] == "api":
            siblings = [{"rfilename": path} for path in files]
            self.answer({"id": name, "sha": COMMIT, "siblings": siblings, "private": False})
        else:
            content = files["/".join(parts[4:])]
            self.answer(content, ETag=f'"{oid(content)}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


def upload_mode(file):
    large = file["path"].endswith(".safetensors")
    return {
        "path": file["path"],
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": False,
    }


def oid(content):
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
