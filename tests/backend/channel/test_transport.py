"""The activation channel over real sockets on loopback."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from paraserve_backend.channel.keys import CurveKeys
from paraserve_backend.channel.transport import (
    Admissions,
    Channel,
    Frame,
    FrameKind,
    Outbox,
    _decode,
    relay,
)
from paraserve_backend.errors import InvalidRequest, Unavailable
from tests.support.limits import HANG_S


def new_keys() -> CurveKeys:
    public, secret = zmq.curve_keypair()
    return CurveKeys(public=public, secret=secret)


def free_addresses(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"tcp://127.0.0.1:{each.getsockname()[1]}" for each in sockets]


@contextlib.contextmanager
def open_channel(listen: str, next_address: str, keys: CurveKeys) -> Iterator[Channel]:
    channel = Channel(listen=listen, next_address=next_address, keys=keys, max_bytes=1 << 24)
    try:
        yield channel
    finally:
        channel.close()


def wait_for_frame(channel: Channel) -> Frame:
    while (frame := channel.receive()) is None:
        pass
    return frame


@pytest.mark.parametrize("payload_bytes", [0, 10, 300_000])
def test_frames_go_round_the_ring_through_a_stage(payload_bytes: int) -> None:
    keys = new_keys()
    link_address, stage_address = free_addresses(2)
    payload = bytes(range(256)) * (payload_bytes // 256) + bytes(payload_bytes % 256)
    stopping = threading.Event()

    def step(frame: Frame) -> Frame:
        body = bytes(frame.body) + b"+" + bytes(frame.payload)
        return Frame(kind=FrameKind.RESULT, number=frame.number, body=body)

    with (
        open_channel(link_address, stage_address, keys) as link,
        open_channel(stage_address, link_address, keys) as stage,
    ):
        thread = threading.Thread(target=relay, args=(stage, step, stopping.is_set))
        thread.start()
        for number in range(3):
            link.send(Frame(kind=FrameKind.FORWARD, number=number, body=b"batch", payload=payload))
            answer = wait_for_frame(link)
            assert (answer.kind, answer.number) == (FrameKind.RESULT, number)
            assert bytes(answer.body) == b"batch+" + payload
        stopping.set()
        thread.join()


def test_a_stage_passes_errors_along_without_computing() -> None:
    keys = new_keys()
    link_address, stage_address = free_addresses(2)
    stopping = threading.Event()
    with (
        open_channel(link_address, stage_address, keys) as link,
        open_channel(stage_address, link_address, keys) as stage,
    ):

        def step(_frame: Frame) -> Frame:
            raise AssertionError("an error must not be computed on")

        thread = threading.Thread(target=relay, args=(stage, step, stopping.is_set))
        thread.start()
        link.send(Frame(kind=FrameKind.ERROR, number=5, body=b"stage 1 failed"))
        answer = wait_for_frame(link)
        stopping.set()
        thread.join()
    assert (answer.kind, answer.number, bytes(answer.body)) == (
        FrameKind.ERROR,
        5,
        b"stage 1 failed",
    )


def test_a_stranger_who_knows_the_public_key_is_not_heard() -> None:
    ours, theirs = new_keys(), new_keys()
    listen, elsewhere, strangers = free_addresses(3)
    with open_channel(listen, elsewhere, ours) as member:
        intruder = CurveKeys(public=theirs.public, secret=theirs.secret)
        with open_channel(strangers, listen, intruder) as stranger:
            # The stranger knows where we are and our public key, but holds another key pair.
            socket = stranger._outbox._socket
            socket.disconnect(listen)
            socket.curve_serverkey = ours.public
            socket.connect(listen)
            stranger.send(Frame(kind=FrameKind.RESULT, number=1, body=b"forged"))
            with open_channel(free_addresses(1)[0], listen, ours) as friend:
                friend.send(Frame(kind=FrameKind.RESULT, number=2, body=b"real"))
                assert wait_for_frame(member).number == 2
                # The forged frame was sent before the real one; it still has not come.
                assert member.receive() is None


def test_key_files_hold_the_public_then_the_secret_key(tmp_path: Path) -> None:
    path = tmp_path / "curve.key"
    path.write_bytes(b"public\nsecret\n")
    keys = CurveKeys.read(path)
    assert (keys.public, keys.secret) == (b"public", b"secret")
    assert "secret" not in repr(keys)


def test_a_malformed_key_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "curve.key"
    path.write_bytes(b"only-one")
    with pytest.raises(InvalidRequest, match="key file is malformed"):
        CurveKeys.read(path)


# ---- what is no frame, and who is lost ----


def send_raw(listen: str, keys: CurveKeys, *messages: list[bytes]) -> None:
    """Send what no outbox would, as somebody with the deployment's keys."""
    outbox = Outbox(address=listen, keys=keys)
    for parts in messages:
        outbox._socket.send_multipart(parts)
    outbox.send(Frame(kind=FrameKind.RESULT, number=99, body=b"the end"))
    outbox._socket.close(linger=int(HANG_S * 1000))
    outbox._context.term()


def header(magic: int = 0x5053, kind: int = 2, number: int = 1) -> bytes:
    return struct.pack("<HBxIQ", magic, kind, 0, number)


MALFORMED = [
    [b""],
    [b"", b""],
    [b"x" * 1000],
    [header()],
    [header()[:-1], b"body"],
    [header() + b"x", b"body"],
    [header(magic=7), b"body"],
    *([header(kind=kind), b"a prompt", b"payload"] for kind in (0, 12, 99, 255)),
]


def test_what_is_no_frame_is_dropped_with_a_line_and_without_its_content(
    caplog: pytest.LogCaptureFixture,
) -> None:
    keys = new_keys()
    listen, elsewhere = free_addresses(2)
    with open_channel(listen, elsewhere, keys) as member:
        send_raw(listen, keys, *MALFORMED)
        assert wait_for_frame(member).number == 99
    assert caplog.text.count("a frame was dropped") == len(MALFORMED)
    assert "a prompt" not in caplog.text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4))
def test_any_parts_are_a_frame_or_a_value_error(parts: list[bytes]) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(_decode([memoryview(part) for part in parts]), Frame)


def test_a_relay_outlives_what_is_no_frame_and_a_neighbour_that_takes_nothing() -> None:
    class Channel_:
        def __init__(self) -> None:
            self.frames = [
                Frame(kind=FrameKind.FORWARD, number=1, body=b""),
                None,
                Frame(kind=FrameKind.FORWARD, number=2, body=b""),
            ]
            self.sent: list[int] = []

        def receive(self) -> Frame | None:
            return self.frames.pop(0)

        def send(self, frame: Frame) -> None:
            if frame.number == 1:
                raise Unavailable("The next pipeline stage does not answer.")
            self.sent.append(frame.number)

    channel = Channel_()
    relay(channel, lambda frame: frame, lambda: not channel.frames)  # type: ignore[arg-type]
    assert channel.sent == [2]


def test_whoever_loses_the_connection_before_it_says_so_to_those_behind_it() -> None:
    keys = new_keys()
    first, second, nowhere = free_addresses(3)
    stopping = threading.Event()
    with (
        open_channel(first, second, keys) as member,
        open_channel(second, nowhere, keys) as behind,
    ):
        thread = threading.Thread(target=relay, args=(member, lambda frame: frame, stopping.is_set))
        thread.start()
        send_raw(first, keys)
        assert wait_for_frame(behind).number == 99
        assert wait_for_frame(behind).kind is FrameKind.LOST
        stopping.set()
        thread.join()


def test_strangers_who_come_and_go_are_no_loss() -> None:
    keys = new_keys()
    listen, elsewhere = free_addresses(2)
    host, port = listen.removeprefix("tcp://").split(":")
    with open_channel(listen, elsewhere, keys) as member:
        for _ in range(5):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with open_channel(free_addresses(1)[0], listen, keys) as friend:
            friend.send(Frame(kind=FrameKind.RESULT, number=2, body=b"real"))
            assert wait_for_frame(member).number == 2
            assert member.receive() is None


def test_a_loss_is_told_once_it_is_certain_and_never_for_a_stranger() -> None:
    admissions = Admissions()
    admissions.accepted(5)
    assert not admissions.ended(5)  # a stranger who went at once
    admissions.accepted(5)
    admissions.handshake_succeeded()
    admissions.accepted(6)
    assert not admissions.ended(6)
    assert admissions.ended(5)
    # Either of two was admitted.
    admissions.accepted(7)
    admissions.accepted(8)
    admissions.handshake_succeeded()
    assert not admissions.ended(8)
    assert admissions.ended(7)
    assert not admissions.ended(7)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["stranger comes", "stranger goes", "friend", "loss"])))
def test_strangers_alone_are_never_a_loss(story: list[str]) -> None:
    """A friend may come and go among them; it is told at most once each time it goes."""
    admissions, strangers = Admissions(), list[int]()
    friend, told, lost = None, 0, 0
    for number, step in enumerate(story):
        match step:
            case "stranger comes":
                strangers.append(number)
                admissions.accepted(number)
            case "stranger goes" if strangers:
                told += admissions.ended(strangers.pop(0))
            case "friend" if friend is None:
                friend = number
                admissions.accepted(number)
                admissions.handshake_succeeded()
            case "loss" if friend is not None:
                lost += 1
                told += admissions.ended(friend)
                friend = None
        assert told <= lost


@pytest.mark.parametrize("address", ["", "nowhere", "tcp://", "tcp://127.0.0.1:x", "\0", "é"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="is no address of an inbox"):
        Outbox(address=address, keys=new_keys())
