"""Serves bytes of this node's tier to other agents, at a limited rate and with low priority.

HTTP/1.1 with keep-alive and byte ranges, so that the code that reads object stores reads peers too:

GET /objects/<name>           with a Range; 404 where the node has nothing of the object, 416 where
                              it lacks these bytes; it never waits for them
GET /holdings/<name>,<name>   JSON: which bytes are there, and which a running fetch will bring

The client, which also signs the requests, is `weights.sources.peer`.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from paraserve_backend.byte_ranges import ByteRange
from paraserve_backend.errors import InvalidRequest, NotFound
from paraserve_backend.weights.sources.peer import HOLDINGS_PATH, OBJECTS_PATH, is_signed
from paraserve_backend.weights.tiers.memory import Tier

logger = logging.getLogger(__name__)

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
#: Bytes sent at a time: how finely the rate is kept.
_STEP_BYTES = 1 << 20
#: "Lower effort" (RFC 8622): routers that know it let everything else go first.
_LOWER_EFFORT = 0x04
#: A client that takes nothing, or asks nothing, for so long is let go.
_IDLE_S = 30.0


class RateLimit:
    """Shares out a rate among threads: each waits until its bytes may go."""

    def __init__(
        self,
        bytes_per_s: float,
        *,
        now: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._now = now
        self._pause = pause
        self._free_at_s = now()
        self._lock = threading.Lock()

    def wait(self, size_bytes: int) -> None:
        """Return when `size_bytes` may be sent."""
        with self._lock:
            now_s = self._now()
            start_s = max(self._free_at_s, now_s)
            self._free_at_s = start_s + size_bytes / self._bytes_per_s
        if start_s > now_s:
            self._pause(start_s - now_s)


class PeerServer:
    """Listens from `start` to `stop`; each connection has a thread, which only moves bytes."""

    def __init__(
        self,
        tier: Tier,
        *,
        host: str,
        port: int,
        token: str | None,
        rate: RateLimit,
        most_connections: int,
    ) -> None:
        """Raises `InvalidRequest` where the address is taken."""
        try:
            self._server = _Server((host.strip("[]"), port), _Handler)
        except OSError as error:
            raise InvalidRequest(
                f"Cannot listen on {host}:{port} for other agents: {error.strerror}."
            ) from None
        self._server.tier = tier
        self._server.token = token
        self._server.rate = rate
        self._server.free = threading.BoundedSemaphore(most_connections)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="peers"
        )

    @property
    def port(self) -> int:
        port: int = self._server.server_address[1]
        return port

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Close everything; reads that run break off, which costs their readers only time."""
        if self._thread.ident is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    tier: Tier
    token: str | None
    rate: RateLimit
    free: threading.BoundedSemaphore
    #: Their threads are waited for, so that none reads a tier that is closed.
    daemon_threads = False

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        # First: where the address is taken, `__init__` ends with `server_close`.
        self._open: set[socket.socket] = set()
        self._closing = False
        self._lock = threading.Lock()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def server_close(self) -> None:
        with self._lock:
            self._closing = True
            for connection in self._open:
                _shut(connection)
        super().server_close()  # waits for the threads

    @contextmanager
    def noted(self, connection: socket.socket) -> Iterator[None]:
        with self._lock:
            self._open.add(connection)
            if self._closing:
                _shut(connection)
        try:
            yield
        finally:
            with self._lock:
                self._open.remove(connection)

    def handle_error(self, request: object, client_address: object) -> None:
        logger.debug("peer connection broke client=%s", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = _IDLE_S
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """A line per read would drown the agent's own."""

    def setup(self) -> None:
        super().setup()
        if self.connection.family == socket.AF_INET6:
            self.connection.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, _LOWER_EFFORT)
        else:
            self.connection.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, _LOWER_EFFORT)

    def handle(self) -> None:
        with self.server.noted(self.connection):
            super().handle()

    def do_GET(self) -> None:
        if not is_signed(self.path, self.server.token, time.time()):
            self._answer(403, b"The cluster token is missing or wrong.")
        elif not self.server.free.acquire(blocking=False):
            self._answer(503, b"This node serves as many peers as it may.")
        else:
            try:
                self._get(urlsplit(self.path).path)
            finally:
                self.server.free.release()

    def _get(self, path: str) -> None:
        if path.startswith(HOLDINGS_PATH):
            holdings = self.server.tier.holdings(path.removeprefix(HOLDINGS_PATH).split(","))
            answer = {name: asdict(holding) for name, holding in holdings.items()}
            self._answer(200, json.dumps(answer).encode())
        elif path.startswith(OBJECTS_PATH):
            self._get_object(path.removeprefix(OBJECTS_PATH))
        else:
            self._answer(404, b"")

    def _get_object(self, name: str) -> None:
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        if found is None:
            self._answer(400, b"Ask for one range of bytes.")
            return
        byte_range = (int(found[1]), int(found[2]) + 1)
        if byte_range[0] >= byte_range[1]:
            self._answer(400, b"Ask for a range that ends after it begins.")
            return
        try:
            with self.server.tier.reading(name, byte_range) as (fd, read):
                self._send(fd, byte_range, version=read.version, size_bytes=read.size_bytes)
        except NotFound as error:
            holding = self.server.tier.holdings([name])[name]
            self._answer(416 if holding.landed else 404, str(error).encode())

    def _send(self, fd: int, byte_range: ByteRange, *, version: str, size_bytes: int) -> None:
        start, end = byte_range
        self.send_response(206)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size_bytes}")
        self.send_header("ETag", f'"{version}"')
        self.end_headers()
        with open(fd, "rb", closefd=False) as file:
            for at in range(start, end, _STEP_BYTES):
                count = min(_STEP_BYTES, end - at)
                self.server.rate.wait(count)
                if self.connection.sendfile(file, at, count) != count:
                    raise ConnectionError("the object file ended early")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the peer has gone already
