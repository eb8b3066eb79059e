"""A server with the endpoints of the hub that `huggingface_hub` calls to upload a folder."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub(BaseHTTPRequestHandler):
    """Repositories in memory: small files come in the commit, others by LFS before it."""

    requests: list[str]
    """Method and path of every request."""
    created: list[dict[str, Any]]
    """Bodies of the requests that create a repository."""
    objects: dict[str, bytes]
    """LFS objects by SHA-256."""
    files: dict[str, bytes]
    """Committed files by path."""
    tokens: set[str]
    """Tokens that requests carried."""
    refuse: bool
    """Whether to answer that the token may not write."""

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.requests.append(f"POST {self.path}")
        self.tokens.add(self.headers.get("Authorization", ""))
        if self.refuse:
            return self.answer({"error": "You don't have the rights to write"}, 403)
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            name = f"{self.created[-1]['organization']}/{self.created[-1]['name']}"
            return self.answer({"url": f"{self.base}/{name}", "id": "1"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**x, "actions": {"upload": {"href": f"{self.base}/lfs/{x['oid']}", "header": {}}}}
                for x in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            for entry in map(json.loads, body.splitlines()):
                value = entry["value"]
                if entry["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.files[value["path"]] = self.objects[value["oid"]]
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            url = f"{self.base}/{name}/commit/abc"
            return self.answer({"commitUrl": url, "commitOid": "abc", "success": True})
        return self.answer({"error": "unknown"}, 404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.requests.append("PUT /lfs/...")
        oid = self.path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer({"error": "other contents than announced"}, 400)
        self.objects[oid] = body
        return self.answer({})

    def do_GET(self) -> None:
        self.requests.append(f"GET {self.path}")
        self.answer({"error": "unknown"}, 404)

    @property
    def base(self) -> str:
        """Address of this server."""
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, data: Any, status: int = 200) -> None:
        """Send JSON."""
        text = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def serve(refuse: bool = False) -> Iterator[tuple[str, type[FakeHub]]]:
    """Serve a hub; yield its address, and what it has received."""
    state = {"requests": [], "created": [], "objects": {}, "files": {}, "tokens": set()}
    hub = type("Hub", (FakeHub,), {**state, "refuse": refuse})
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", hub
    server.shutdown()
    server.server_close()
