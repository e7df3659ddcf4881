"""Serves bytes of this node's tier to other agents, at a limited rate and with low priority.

HTTP/1.1 with keep-alive and byte ranges, so that the code that reads object stores reads peers too:

GET /objects/<name>           with a Range; 404 where the node has nothing of the object, 416 where
                              it lacks these bytes; it never waits for them
GET /holdings/<name>,<name>   JSON: which bytes are there, and which a running fetch will bring

The client is `weights.sources.peer`, what both sides sign `weights.sources.peer_auth`, and the
sockets and threads are in `agent.peer_port`.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict

from paraserve_backend.agent.peer_port import PeerPort, PeerRequest, header_of
from paraserve_backend.byte_ranges import ByteRange
from paraserve_backend.errors import InvalidRequest, NotFound
from paraserve_backend.weights.sources.base import StoredObject
from paraserve_backend.weights.sources.peer import HOLDINGS_PATH, OBJECTS_PATH
from paraserve_backend.weights.sources.peer_auth import (
    DIGEST_HEADER,
    NONCE_HEADER,
    PROOF_HEADER,
    SIGNED_HEADERS,
    PeerAnswer,
    PeerQuestion,
    body_digest,
)
from paraserve_backend.weights.tiers.digests import DamagedPiece
from paraserve_backend.weights.tiers.memory import Tier

logger = logging.getLogger(__name__)

_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{1,18})")
#: Bytes sent at a time: how finely the rate is kept.
_STEP_BYTES = 1 << 20
#: "Lower effort" (RFC 8622): routers that know it let everything else go first.
_LOWER_EFFORT = 0x04
#: Longest range of which a digest is made, if need be; a member asks for a chunk or a small file.
_MOST_BYTES = 256 << 20


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
    """Serves a tier from `start` to `stop`."""

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
        self._tier = tier
        self._token = token
        self._rate = rate
        try:
            self._port = PeerPort(
                host.strip("[]"),
                port,
                check=self._refusal,
                serve=self._serve,
                most_at_once=most_connections,
            )
        except OSError as error:
            raise InvalidRequest(
                f"Cannot listen on {host}:{port} for other agents: {error.strerror}."
            ) from None
        self._address = f"{host}:{self.port}"

    @property
    def port(self) -> int:
        return self._port.port

    def start(self, address: str | None = None) -> None:
        """Begin to answer; `address` is how others reach this node, if not as it listens."""
        self._address = address or self._address
        self._port.start()

    def stop(self) -> None:
        """Close everything; reads that run break off, which costs their readers only time."""
        self._port.stop()

    def _refusal(self, request: PeerRequest) -> tuple[int, str] | None:
        if self._question(request).is_signed(_signed(request), self._token, time.time()):
            return None
        return 403, "The cluster token is missing or wrong."

    def _question(self, request: PeerRequest) -> PeerQuestion:
        """Return what is asked. It was asked of us: what is signed for others does not fit."""
        return PeerQuestion(
            host=self._address,
            path=request.path,
            byte_range=_range_of(request),
            nonce=request.headers.get(NONCE_HEADER.lower(), ""),
        )

    def _serve(self, request: PeerRequest, connection: socket.socket) -> None:
        _lower_effort(connection)
        asked = self._question(request)
        if request.path.startswith(HOLDINGS_PATH):
            self._tell_holdings(asked, connection)
        elif request.path.startswith(OBJECTS_PATH):
            self._give(asked, connection)
        else:
            _say(connection, 404, b"")

    def _tell_holdings(self, asked: PeerQuestion, connection: socket.socket) -> None:
        holdings = self._tier.holdings(asked.path.removeprefix(HOLDINGS_PATH).split(","))
        body = json.dumps({name: asdict(holding) for name, holding in holdings.items()}).encode()
        answer = PeerAnswer(
            question=asked, version="", size_bytes=len(body), digest=body_digest(body)
        )
        proof = {PROOF_HEADER: answer.proof(self._token)}
        connection.sendall(header_of(200, len(body), proof) + body)

    def _give(self, asked: PeerQuestion, connection: socket.socket) -> None:
        name, byte_range = asked.path.removeprefix(OBJECTS_PATH), asked.byte_range
        if byte_range is None or not 0 < byte_range[1] - byte_range[0] <= _MOST_BYTES:
            _say(connection, 400, b"Ask for one range of bytes, not too many.")
            return
        try:
            with self._tier.reading(name, byte_range) as (fd, stored):
                digest = self._tier.digests.attest(name, byte_range, fd)
                self._send(asked, fd, byte_range, stored, digest, connection)
        except NotFound as error:
            holding = self._tier.holdings([name])[name]
            _say(connection, 416 if holding.landed else 404, str(error).encode())
        except DamagedPiece:
            self._tier.drop_damaged(name, byte_range)
            _say(connection, 404, b"These bytes are damaged here.")

    def _send(
        self,
        asked: PeerQuestion,
        fd: int,
        byte_range: ByteRange,
        stored: StoredObject,
        digest: int,
        connection: socket.socket,
    ) -> None:
        start, end = byte_range
        answer = PeerAnswer(
            question=asked,
            version=stored.version,
            size_bytes=stored.size_bytes,
            digest=str(digest),
        )
        headers = {
            "Content-Range": f"bytes {start}-{end - 1}/{stored.size_bytes}",
            "ETag": f'"{stored.version}"',
            DIGEST_HEADER: answer.digest,
            PROOF_HEADER: answer.proof(self._token),
        }
        connection.sendall(header_of(206, end - start, headers))
        with open(fd, "rb", closefd=False) as file:
            for at in range(start, end, _STEP_BYTES):
                count = min(_STEP_BYTES, end - at)
                self._rate.wait(count)
                if connection.sendfile(file, at, count) != count:
                    raise ConnectionError("the object file ended early")


def _signed(request: PeerRequest) -> dict[str, str]:
    """Return the headers by the names that signatures have."""
    return {name: request.headers.get(name.lower(), "") for name in SIGNED_HEADERS}


def _range_of(request: PeerRequest) -> ByteRange | None:
    found = _RANGE.fullmatch(request.headers.get("range", ""))
    return (int(found[1]), int(found[2]) + 1) if found else None


def _say(connection: socket.socket, status: int, body: bytes) -> None:
    connection.sendall(header_of(status, len(body)) + body)


def _lower_effort(connection: socket.socket) -> None:
    if connection.family == socket.AF_INET6:
        connection.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, _LOWER_EFFORT)
    else:
        connection.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, _LOWER_EFFORT)
