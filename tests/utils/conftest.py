"""A small Cloud Storage server in memory that honours generations and can be told to fail, request by request."""

import base64
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c
import pytest

FAULTS = ("429", "500", "503", "reset", "lost_reply", "short_body", "wrong_checksum", "slow")


@dataclass
class Bucket:
    """Objects by name: (content, generation); and the faults to come, by number of the request."""

    objects: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    down: bool = False
    requests: list[str] = field(default_factory=list)
    uploads: dict[str, tuple[str, bytearray]] = field(default_factory=dict)
    generation: int = 1
    lock: threading.Lock = field(default_factory=threading.Lock)
    on_write: Callable[[str], None] | None = None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if re.fullmatch(r"/storage/v1/b/[^/]+", urlsplit(self.path).path):
            # The client asks about the bucket itself in a thread of its own, whenever it likes: not counted.
            self._reply(200, b'{"name": "bucket"}')
            return
        with self.bucket.lock:
            number = len(self.bucket.requests)
            self.bucket.requests.append(f"{method} {self.path}")
            fault = "503" if self.bucket.down else self.bucket.faults.get(number)
        if fault == "reset":
            self.close_connection = True
            self.connection.close()
            return
        if fault in {"429", "500", "503"}:
            self._reply(int(fault), b'{"error": {"message": "injected"}}')
            return
        if fault == "slow":
            time.sleep(0.3)
        status, content, headers = self._answer(method, body)
        if fault == "lost_reply":
            self.close_connection = True
            self.connection.close()
            return
        if fault == "wrong_checksum" and "x-goog-hash" in headers:
            headers["x-goog-hash"] = "crc32c=AAAAAA=="
        self._reply(status, content, headers, short=fault == "short_body")

    def _reply(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, *, short: bool = False
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if short and len(content) > 1:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)

    def _answer(self, method: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        with self.bucket.lock:
            if url.path.startswith("/upload/"):
                return self._upload(method, query, body)
            match = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o(?:/(.+))?", url.path)
            if match is None:
                return 404, b'{"error": {"message": "bucket?"}}', {}
            if match[2] is None:
                return self._list(query)
            return self._object(method, unquote(match[2]), query)

    def _list(self, query: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        prefix = query.get("prefix", "")
        items = [self._resource(name) for name in sorted(self.bucket.objects) if name.startswith(prefix)]
        return 200, json.dumps({"kind": "storage#objects", "items": items}).encode(), {}

    def _object(self, method: str, name: str, query: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        if name not in self.bucket.objects:
            return 404, b'{"error": {"message": "No such object"}}', {}
        content, generation = self.bucket.objects[name]
        if method == "DELETE":
            del self.bucket.objects[name]
            return 204, b"", {}
        if query.get("alt") == "media":
            checksum = base64.b64encode(google_crc32c.Checksum(content).digest()).decode()
            return 200, content, {"x-goog-generation": str(generation), "x-goog-hash": f"crc32c={checksum}"}
        return 200, json.dumps(self._resource(name)).encode(), {}

    def _upload(self, method: str, query: dict[str, str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if query["uploadType"] == "multipart":
            boundary = self.headers["Content-Type"].split("boundary=")[1].strip('"').encode()
            parts = body.split(b"--" + boundary)
            name = json.loads(parts[1].split(b"\r\n\r\n", 1)[1])["name"]
            return self._store(name, parts[2].split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n"), query)
        if method == "POST":
            key = f"upload{len(self.bucket.uploads)}"
            self.bucket.uploads[key] = (json.loads(body)["name"], bytearray())
            location = f"http://{self.headers['Host']}{urlsplit(self.path).path}?uploadType=resumable&upload_id={key}"
            return 200, b"{}", {"Location": location}
        name, received = self.bucket.uploads[query["upload_id"]]
        span = re.fullmatch(r"bytes (\d+|\*)-?(\d*)/(\d+|\*)", self.headers["Content-Range"])
        assert span is not None
        if span[1] != "*":
            del received[int(span[1]) :]
            received += body
        if span[3] != "*" and len(received) == int(span[3]):
            return self._store(name, bytes(received), {})
        headers = {"Range": f"bytes=0-{len(received) - 1}"} if received else {}
        return 308, b"", headers

    def _store(self, name: str, content: bytes, query: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        wanted = query.get("ifGenerationMatch")
        now = self.bucket.objects[name][1] if name in self.bucket.objects else 0
        if wanted is not None and int(wanted) != now:
            return 412, b'{"error": {"message": "conditionNotMet"}}', {}
        self.bucket.generation += 1
        self.bucket.objects[name] = (content, self.bucket.generation)
        if self.bucket.on_write is not None:
            self.bucket.on_write(name)
        return 200, json.dumps(self._resource(name)).encode(), {}

    def _resource(self, name: str) -> dict[str, str]:
        content, generation = self.bucket.objects[name]
        checksum = base64.b64encode(google_crc32c.Checksum(content).digest()).decode()
        return {"name": name, "size": str(len(content)), "generation": str(generation), "crc32c": checksum}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A running server's bucket, which answers to any name; the client finds it through the environment."""
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
