"""What somebody without the token can do to the port for other agents: nothing that lasts."""

from __future__ import annotations

import http.client
import logging
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from paraserve_backend.agent import peer_port
from paraserve_backend.agent.peer_port import PeerPort, PeerRequest, Serve, header_of
from tests.support.limits import HANG_S


def check(request: PeerRequest) -> tuple[int, str] | None:
    return None if request.headers.get("secret") == "ours" else (403, "No.")


def serve(request: PeerRequest, connection: socket.socket) -> None:
    connection.sendall(header_of(200, 2) + b"ok")


@contextmanager
def opened(serve: Serve = serve, most_at_once: int = 2) -> Iterator[PeerPort]:
    port = PeerPort("127.0.0.1", 0, check=check, serve=serve, most_at_once=most_at_once)
    port.start()
    try:
        yield port
    finally:
        port.stop()


@pytest.fixture
def port() -> Iterator[PeerPort]:
    with opened() as made:
        yield made


def ask(port: PeerPort, **headers: str) -> tuple[int, bytes]:
    client = http.client.HTTPConnection("127.0.0.1", port.port, timeout=HANG_S)
    client.request("GET", "/x", headers=headers)
    answer = client.getresponse()
    said = answer.status, answer.read()
    client.close()
    return said


def is_let_go(connection: socket.socket) -> bool:
    connection.settimeout(HANG_S)
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_a_member_asks_again_and_again_on_one_connection(port: PeerPort) -> None:
    client = http.client.HTTPConnection("127.0.0.1", port.port, timeout=HANG_S)
    client.connect()
    sock = client.sock
    for _ in range(5):
        client.request("GET", "/x", headers={"Secret": "ours"})
        assert client.getresponse().read() == b"ok"
    assert client.sock is sock
    client.request("GET", "/x")  # each request is looked at
    assert client.getresponse().status == 403
    client.close()


def test_no_thread_is_spent_on_who_may_not_be_heard(port: PeerPort) -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(socket.create_connection(("127.0.0.1", port.port)))
        for _ in range(3):
            assert ask(port) == (403, b"No.")
        assert threading.active_count() == before


@pytest.mark.parametrize("num", [40, 300])
def test_members_are_served_however_many_strangers_wait(port: PeerPort, num: int) -> None:
    with ExitStack() as stack:
        strangers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port.port), HANG_S))
            for _ in range(num)
        ]
        assert ask(port, Secret="ours") == (200, b"ok")
        # Those that have waited longest went first, so that whoever comes can say who he is.
        assert is_let_go(strangers[0])


def test_a_stranger_has_so_long_for_all_he_says(
    port: PeerPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_port, "_HEADER_S", 0.2)
    with socket.create_connection(("127.0.0.1", port.port)) as slow:
        slow.settimeout(HANG_S)
        ended = threading.Event()

        def drip() -> None:
            while not ended.wait(0.02):
                try:
                    slow.send(b"x")
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        assert is_let_go(slow)
        ended.set()
        dripping.join()


@pytest.mark.parametrize(
    "said",
    [
        b"POST /x HTTP/1.1\r\nSecret: ours\r\n\r\n",
        b"GET /x HTTP/1.1\r\nSecret: ours\r\nContent-Length: 5\r\n\r\nhello",
        b"GET /x HTTP/1.1\r\nSecret: ours\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /x HTTP/1.1\r\nSecret: ours\r\nSecret: ours\r\n\r\n",
        b"GET /x HTTP/1.1\r\nSecret: ours\r\n\r\nGET /y HTTP/1.1\r\n\r\n",
        b"GET x HTTP/1.1\r\nSecret: ours\r\n\r\n",
        b"\xff\xfe\r\n\r\n",
        b"\r\n\r\n",
        b"x" * 20_000,
    ],
)
def test_what_is_no_question_of_a_member_ends_its_connection_only(
    port: PeerPort, said: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", port.port), HANG_S) as odd:
        odd.sendall(said)
        odd.settimeout(HANG_S)
        answer = b""
        try:
            while piece := odd.recv(1000):
                answer += piece
        except ConnectionError:
            pass
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert ask(port, Secret="ours") == (200, b"ok")


def test_more_at_once_than_may_be_is_told_so_at_once() -> None:
    go_on, begun = threading.Event(), threading.Semaphore(0)

    def slow(request: PeerRequest, connection: socket.socket) -> None:
        begun.release()
        go_on.wait(HANG_S)
        serve(request, connection)

    with opened(serve=slow, most_at_once=1) as port:
        first: list[tuple[int, bytes]] = []
        asking = threading.Thread(target=lambda: first.append(ask(port, Secret="ours")))
        asking.start()
        assert begun.acquire(timeout=HANG_S)
        assert ask(port, Secret="ours")[0] == 503
        go_on.set()
        asking.join()
        assert first == [(200, b"ok")]


def test_a_request_that_fails_ends_no_other() -> None:
    def fail(request: PeerRequest, connection: socket.socket) -> None:
        if request.path == "/x":
            raise RuntimeError("a bug")
        serve(request, connection)

    with opened(serve=fail) as port:
        for _ in range(3):
            with pytest.raises((http.client.HTTPException, ConnectionError)):
                ask(port, Secret="ours")
        client = http.client.HTTPConnection("127.0.0.1", port.port, timeout=HANG_S)
        client.request("GET", "/y", headers={"Secret": "ours"})
        assert client.getresponse().read() == b"ok"
        client.close()


class _Told(logging.Handler):
    """Knows once somebody has been warned."""

    def __init__(self) -> None:
        super().__init__()
        self.warned = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.warned.set()


def test_running_out_of_descriptors_ends_nothing() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = _Told()
    peer_port.logger.addHandler(told)
    with opened() as port, ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(4)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(it.fileno() for it in clients) + 1, hard))
        try:
            for client in clients:
                client.connect(("127.0.0.1", port.port))
            assert told.warned.wait(HANG_S)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            peer_port.logger.removeHandler(told)
        assert ask(port, Secret="ours") == (200, b"ok")


def test_its_end_ends_all_connections_and_threads() -> None:
    before = threading.active_count()
    with opened() as port:
        idle = socket.create_connection(("127.0.0.1", port.port))
        assert ask(port, Secret="ours") == (200, b"ok")
    assert is_let_go(idle)
    idle.close()
    assert threading.active_count() == before
