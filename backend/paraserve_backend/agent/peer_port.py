"""The port for other agents: who may be heard on it, without a thread for those who may not.

One thread waits for all connections at once and reads requests' headers. Only a request that a
member of the cluster has signed gets a worker. So somebody without the token can hold a few
connections for a few seconds, and nothing else. What is answered is in `agent.peer_server`.
"""

from __future__ import annotations

import logging
import resource
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus

logger = logging.getLogger(__name__)

#: A question with the most names is half as long.
_MOST_HEADER_BYTES = 16 << 10
#: So long a stranger has to say who he is, however slowly he says it.
_HEADER_S = 5.0
#: A member that asks nothing, or takes nothing, for so long is let go.
_IDLE_S = 30.0
#: Strangers at once: in all, and from one host.
_MOST_STRANGERS, _MOST_STRANGERS_A_HOST = 64, 16
#: All connections, and which part of this process's descriptors they may be.
_MOST_CONNECTIONS, _DESCRIPTORS_PART = 512, 4
_BACKLOG = 128
#: Pause before the port accepts again after the process ran out of descriptors.
_REST_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRequest:
    """A GET with its headers, by their names in lower case."""

    path: str
    headers: Mapping[str, str]


@dataclass(slots=True, kw_only=True, eq=False)
class Caller:
    """One connection while it waits for a request."""

    socket: socket.socket
    host: str
    deadline_s: float
    is_member: bool = False
    said: bytearray = field(default_factory=bytearray)


#: Returns the status and a sentence with which to refuse a request; `None` where it is signed.
Check = Callable[[PeerRequest], tuple[int, str] | None]
#: Answers a signed request on a connection that blocks; raises `OSError` where that breaks.
Serve = Callable[[PeerRequest, socket.socket], None]


class PeerPort:
    """Listens from `start` to `stop`. `most_at_once` requests are served at once."""

    def __init__(
        self, host: str, port: int, *, check: Check, serve: Serve, most_at_once: int
    ) -> None:
        """Raises `OSError` where the address cannot be had."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        self._listener.setblocking(False)
        self._check = check
        self._serve = serve
        self._free = threading.BoundedSemaphore(most_at_once)
        self._pool = ThreadPoolExecutor(most_at_once, thread_name_prefix="peer")
        self._most = min(_MOST_CONNECTIONS, _descriptors() // _DESCRIPTORS_PART)
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._waiting: dict[socket.socket, Caller] = {}
        self._serving: set[socket.socket] = set()
        self._back: deque[tuple[Caller, bool]] = deque()
        self._lock = threading.Lock()
        self._stopped = False
        self._accepts_at_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="peers")

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def start(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        self._thread.start()

    def stop(self) -> None:
        """Close everything; reads that run break off, which costs their readers only time."""
        with self._lock:
            self._stopped = True
            for connection in self._serving:
                _shut(connection)
        if self._thread.ident is not None:
            self._wake()
            self._thread.join()
        self._pool.shutdown()  # no thread reads a tier that is closed
        for caller in [*self._waiting.values(), *(caller for caller, _ in self._back)]:
            caller.socket.close()
        for each in (self._listener, self._wake_in, self._wake_out):
            each.close()
        self._selector.close()

    # ---- the one thread ----

    def _run(self) -> None:
        while not self._stopped:
            try:
                self._turn()
            except OSError:  # out of descriptors, or of memory: look again in a moment
                logger.warning("peer port failed, and goes on", exc_info=True)
                time.sleep(_REST_S)

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._until_next_s()):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._wake_in:
                with suppress(BlockingIOError):
                    self._wake_in.recv(4096)
            elif key.data in self._waiting.values():
                self._hear(key.data)
        self._take_back()
        now_s = time.monotonic()
        for caller in [it for it in self._waiting.values() if it.deadline_s <= now_s]:
            self._let_go(caller)
        if self._accepts_at_s is not None and self._accepts_at_s <= now_s:
            self._accepts_at_s = None
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _until_next_s(self) -> float | None:
        times_s = [caller.deadline_s for caller in self._waiting.values()]
        if self._accepts_at_s is not None:
            times_s.append(self._accepts_at_s)
        return max(min(times_s) - time.monotonic(), 0.0) if times_s else None

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # whoever it was has gone
        except OSError as error:
            logger.warning("nobody is let in for a moment reason=%s", error.strerror)
            self._selector.unregister(self._listener)
            self._accepts_at_s = time.monotonic() + _REST_S
            return
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._make_room(address[0])
        if len(self._waiting) + len(self._serving) >= self._most:
            connection.close()
            return
        deadline_s = time.monotonic() + _HEADER_S
        self._wait_for(Caller(socket=connection, host=address[0], deadline_s=deadline_s))

    def _make_room(self, host: str) -> None:
        """Let go the stranger that has waited longest, where there are as many as may be."""
        strangers = [caller for caller in self._waiting.values() if not caller.is_member]
        of_host = [caller for caller in strangers if caller.host == host]
        if len(of_host) >= _MOST_STRANGERS_A_HOST:
            self._let_go(of_host[0])
        elif len(strangers) >= _MOST_STRANGERS:
            self._let_go(strangers[0])

    def _hear(self, caller: Caller) -> None:
        try:
            piece = caller.socket.recv(_MOST_HEADER_BYTES)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        caller.said += piece
        if not piece or len(caller.said) > _MOST_HEADER_BYTES:
            self._let_go(caller)
            return
        header, end, rest = caller.said.partition(b"\r\n\r\n")
        if not end:
            return
        request = _parse(bytes(header))
        if request is None or rest:
            self._refuse(caller, 400, "Ask for one thing at a time, with GET.")
            return
        refusal = self._check(request)
        if refusal is not None:
            self._refuse(caller, *refusal)
            return
        caller.is_member = True
        self._hand_over(caller, request)

    def _hand_over(self, caller: Caller, request: PeerRequest) -> None:
        self._forget(caller)
        caller.said.clear()
        if not self._free.acquire(blocking=False):
            self._wait_for(caller)
            _say(caller.socket, 503, b"This node serves as many peers as it may.")
            return
        with self._lock:
            self._serving.add(caller.socket)
        self._pool.submit(self._work, caller, request)

    def _work(self, caller: Caller, request: PeerRequest) -> None:
        is_open = False
        try:
            caller.socket.settimeout(_IDLE_S)
            self._serve(request, caller.socket)
            caller.socket.setblocking(False)
            is_open = True
        except OSError as error:
            logger.debug("peer connection broke host=%s reason=%s", caller.host, error)
        except Exception:  # one request shall not end the others
            logger.exception("peer request failed host=%s", caller.host)
        finally:
            self._free.release()
            with self._lock:
                self._serving.discard(caller.socket)
                self._back.append((caller, is_open))
            self._wake()

    def _take_back(self) -> None:
        while self._back:
            caller, is_open = self._back.popleft()
            if is_open and not self._stopped:
                self._wait_for(caller)
            else:
                caller.socket.close()

    def _wait_for(self, caller: Caller) -> None:
        if caller.is_member:
            caller.deadline_s = time.monotonic() + _IDLE_S
        self._waiting[caller.socket] = caller
        self._selector.register(caller.socket, selectors.EVENT_READ, caller)

    def _refuse(self, caller: Caller, status: int, reason: str) -> None:
        _say(caller.socket, status, reason.encode())
        self._let_go(caller)

    def _let_go(self, caller: Caller) -> None:
        self._forget(caller)
        caller.socket.close()

    def _forget(self, caller: Caller) -> None:
        self._selector.unregister(caller.socket)
        del self._waiting[caller.socket]

    def _wake(self) -> None:
        with suppress(OSError):  # it is awake already, or has ended
            self._wake_out.send(b"x", socket.MSG_DONTWAIT)


def header_of(status: int, length: int, headers: Mapping[str, str] | None = None) -> bytes:
    """Return the head of an answer."""
    fields = {"Content-Length": str(length)} | dict(headers or {})
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", errors="replace")


def _say(connection: socket.socket, status: int, body: bytes) -> None:
    """Say a short thing without waiting for it to be heard."""
    with suppress(OSError):
        connection.send(header_of(status, len(body)) + body, socket.MSG_DONTWAIT)


def _parse(header: bytes) -> PeerRequest | None:
    first, *lines = header.decode("latin-1").split("\r\n")
    method, _, rest = first.partition(" ")
    path, _, version = rest.partition(" ")
    if method != "GET" or version not in ("HTTP/1.1", "HTTP/1.0") or not path.startswith("/"):
        return None
    fields = [line.partition(":") for line in lines]
    headers = {name.strip().lower(): value.strip() for name, _, value in fields}
    # A body would be taken for the next request.
    has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
    return (
        None if has_body or len(headers) != len(lines) else PeerRequest(path=path, headers=headers)
    )


def _descriptors() -> int:
    """Return how many descriptors this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else _MOST_CONNECTIONS * _DESCRIPTORS_PART


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # the peer has gone already
        connection.shutdown(socket.SHUT_RDWR)
