"""The activation channel over real sockets on loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from paraserve_backend.channel.keys import CurveKeys
from paraserve_backend.channel.transport import Channel, Frame, FrameKind, relay
from paraserve_backend.errors import InvalidRequest


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
