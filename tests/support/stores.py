"""Object stores for tests: a real one (rclone), and one that fails in scripted ways."""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.limits import HANG_S

ACCESS_KEY = "AKIDTEST"
SECRET_KEY = "SECRETTEST"
BUCKET = "models"


@contextmanager
def rclone_store(folder: Path) -> Iterator[str]:
    """Serve the sub-folders of `folder` as buckets; gives the endpoint's URL."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    server = subprocess.Popen(
        [
            Path(sys.executable).with_name("rclone"),
            *("serve", "s3", "--addr", f"127.0.0.1:{port}", "--config", os.devnull),
            *("--etag-hash", "", "--vfs-read-chunk-size", "0", "--buffer-size", "0"),
            *("--dir-cache-time", "0s", folder),
        ],
        # Not as an argument: those are for every user of the machine to see.
        env={**os.environ, "RCLONE_AUTH_KEY": f'"{ACCESS_KEY},{SECRET_KEY}"'},
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for_port(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(HANG_S)


def _wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + HANG_S
    while time.monotonic() < deadline_s:
        assert server.poll() is None, "rclone ended at once"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.01)
    raise AssertionError("rclone does not answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Get:
    """One GET as the store saw it; the range is half-open."""

    key: str
    start: int
    end: int
    client_port: int
    query: str


class ScriptedStore:
    """An S3 server over a dictionary that serves one bucket and does what `script` says.

    Each GET of an object takes the next step of the script, or is answered well.
    """

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self.etags = {key: f'"etag-{key}"' for key in objects}
        self.script: deque[Step] = deque()
        #: What the first GET from this byte of this object takes in place of the script's next.
        self.steps_at: dict[tuple[str, int], Step] = {}
        self.gets: list[Get] = []
        self.sent_bytes = 0
        self.lock = threading.Lock()
        #: GETs from this byte of this object on wait until `release` is set.
        self.held: tuple[str, int] | None = None
        self.release = threading.Event()
        #: Set as soon as a GET waits.
        self.waiting = threading.Event()
        #: GETs that wait now, whether or not anybody still wants their answer.
        self.num_waiting = 0

    def refusal(self, path: str, headers: Mapping[str, str]) -> Answer | None:
        """Return the answer to a request that is refused before it is looked at."""
        return None

    @property
    def requested_bytes(self) -> int:
        return sum(get.end - get.start for get in self.gets)


@dataclass(slots=True, kw_only=True)
class Answer:
    """What the store is about to say; a step may change it."""

    status: int = 206
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes
    #: The connection is closed after this many bytes of the body.
    cut_after: int | None = None
    #: The rest waits for `ScriptedStore.release` after this many bytes.
    stall_after: int | None = None
    #: The body trickles, until `ScriptedStore.release`.
    bytes_per_s: int | None = None


Step = Callable[[Answer], None]


def answer_well(answer: Answer) -> None:
    """Do nothing: a step that keeps the place of a good answer in a script."""


def cut_after(count: int) -> Step:
    def step(answer: Answer) -> None:
        answer.cut_after = count

    return step


def stall_after(count: int) -> Step:
    def step(answer: Answer) -> None:
        answer.stall_after = count

    return step


def throttle(bytes_per_s: int) -> Step:
    def step(answer: Answer) -> None:
        answer.bytes_per_s = bytes_per_s

    return step


def refuse(status: int, code: str = "InternalError") -> Step:
    def step(answer: Answer) -> None:
        answer.status = status
        answer.body = f"<Error><Code>{code}</Code></Error>".encode()
        answer.headers = {"Content-Length": str(len(answer.body))}

    return step


def with_header(name: str, value: str | None) -> Step:
    def step(answer: Answer) -> None:
        answer.headers.pop(name)
        if value is not None:
            answer.headers[name] = value

    return step


def as_status(status: int) -> Step:
    def step(answer: Answer) -> None:
        answer.status = status

    return step


def whole_object(content: bytes) -> Step:
    """Answer as a server that does not know ranges."""

    def step(answer: Answer) -> None:
        answer.status = 200
        answer.body = content
        answer.headers["Content-Length"] = str(len(content))
        del answer.headers["Content-Range"]

    return step


def make_certificate(folder: Path) -> Path:
    """Write a certificate for 127.0.0.1 and its key into one file."""
    path = folder / "server.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", path, "-out", folder / "certificate.pem"),
        ],
        check=True,
        capture_output=True,
    )
    path.write_text(path.read_text() + (folder / "certificate.pem").read_text())
    return path


@contextmanager
def serve(store: ScriptedStore, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serve `store` on this machine; gives the endpoint's URL."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.store = store
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_address[1]}"
    finally:
        store.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    store: ScriptedStore
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may leave as they like
            traceback.print_exc()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    timeout = HANG_S

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        refusal = self.server.store.refusal(self.path, dict(self.headers))
        if refusal is not None:
            self._send(refusal)
        elif "list-type" in parse_qs(url.query):
            self._list(parse_qs(url.query).get("prefix", [""])[0])
        else:
            self._get(unquote(url.path).removeprefix(f"/{BUCKET}/"))

    def _list(self, prefix: str) -> None:
        store = self.server.store
        entries = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(content)}</Size><ETag>{store.etags[key]}</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, content in store.objects.items()
            if key.startswith(prefix)
        )
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/xml"}
        self._send(Answer(status=200, headers=headers, body=body.encode()))

    def _get(self, key: str) -> None:
        store = self.server.store
        content = store.objects[key]
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert found, "every read states its range"
        start, end = int(found[1]), min(int(found[2]) + 1, len(content))
        answer = Answer(body=content[start:end])
        answer.headers = {
            "Content-Length": str(end - start),
            "Content-Range": f"bytes {start}-{end - 1}/{len(content)}",
            "ETag": store.etags[key],
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
        }
        with store.lock:
            get = Get(
                key=key,
                start=start,
                end=end,
                client_port=self.client_address[1],
                query=urlsplit(self.path).query,
            )
            store.gets.append(get)
            step = store.steps_at.pop((key, start), None)
            if step is None:
                step = store.script.popleft() if store.script else answer_well
        step(answer)
        if store.held and store.held[0] == key and end > store.held[1]:
            self._wait()
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        body = answer.body
        if answer.stall_after is not None:
            self._write(body[: answer.stall_after])
            self._wait()
            body = body[answer.stall_after :]
        if answer.bytes_per_s is not None:
            body = self._trickle(body, answer.bytes_per_s)
        self._write(body[: answer.cut_after])
        self.close_connection = answer.cut_after is not None

    def _write(self, body: bytes) -> None:
        self.wfile.write(body)
        with self.server.store.lock:
            self.server.store.sent_bytes += len(body)

    def _trickle(self, body: bytes, bytes_per_s: int) -> bytes:
        """Send at this rate; returns what is left once it is released."""
        step_bytes = max(bytes_per_s // 20, 1)
        for at in range(0, len(body), step_bytes):
            if self.server.store.release.wait(step_bytes / bytes_per_s):
                return body[at:]
            self._write(body[at : at + step_bytes])
        return b""

    def _wait(self) -> None:
        store = self.server.store
        with store.lock:
            store.num_waiting += 1
        store.waiting.set()
        store.release.wait(HANG_S)
        with store.lock:
            store.num_waiting -= 1
