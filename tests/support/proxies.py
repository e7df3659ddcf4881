"""An HTTP proxy on this machine: forwards requests, tunnels TLS, notes what it was asked for."""

from __future__ import annotations

import http.client
import select
import socket
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tests.support.limits import HANG_S

#: Nobody listens there.
DEAD = "http://127.0.0.1:1"
_COPIED = ("Content-Length", "Content-Range", "Content-Type", "ETag", "Last-Modified")


@dataclass(slots=True, kw_only=True)
class Proxy:
    url: str = ""
    #: User and password it demands, as user:password.
    credentials: str = ""
    #: Of each request the method and the target, without the query.
    seen: list[tuple[str, str]] = field(default_factory=list)
    #: Where it finds hosts that only it knows, as host:port.
    hosts: dict[str, str] = field(default_factory=dict)

    def count(self, method: str, part: str = "") -> int:
        return sum(method == each and part in target for each, target in self.seen)


@contextmanager
def running_proxy(credentials: str = "") -> Iterator[Proxy]:
    server = _Server(("127.0.0.1", 0), _Handler)
    host, port = server.server_address[:2]
    server.proxy = Proxy(url=f"http://{host!s}:{port}", credentials=credentials)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    proxy: Proxy
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = HANG_S

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if not self._is_admitted():
            return
        parts = urlsplit(self.path)
        proxy = self.server.proxy
        client = http.client.HTTPConnection(
            proxy.hosts.get(parts.netloc, parts.netloc), timeout=HANG_S
        )
        headers = {name: self.headers[name] for name in ("Host", "Range") if name in self.headers}
        headers |= {
            name: value
            for name, value in self.headers.items()
            if name.lower() in ("authorization",) or name.lower().startswith("x-amz-")
        }
        client.request("GET", f"{parts.path}?{parts.query}", headers=headers)
        answer = client.getresponse()
        body = answer.read()
        client.close()
        self.send_response(answer.status)
        for name in _COPIED:
            if (value := answer.headers.get(name)) is not None and name != "Content-Length":
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self) -> None:
        if not self._is_admitted():
            return
        host, _, port = self.server.proxy.hosts.get(self.path, self.path).rpartition(":")
        with socket.create_connection((host, int(port)), 10) as upstream:
            self.send_response(200)
            self.end_headers()
            _pump(self.connection, upstream)
        self.close_connection = True

    def _is_admitted(self) -> bool:
        proxy = self.server.proxy
        proxy.seen.append((self.command, self.path.partition("?")[0]))
        wanted = f"Basic {b64encode(proxy.credentials.encode()).decode()}"
        if not proxy.credentials or self.headers.get("Proxy-Authorization") == wanted:
            return True
        self.send_response(407)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False


def _pump(one: socket.socket, other: socket.socket) -> None:
    """Pass bytes both ways until either side ends."""
    to = {one: other, other: one}
    while True:
        readable, _, _ = select.select([one, other], [], [], 30)
        for source in readable:
            data = source.recv(1 << 16)
            if not data:
                return
            to[source].sendall(data)
        if not readable:
            return
