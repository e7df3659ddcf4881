"""What other replicas say never ends the thread that listens, whatever it is."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from paraserve_backend.channel.keys import CurveKeys
from paraserve_backend.channel.mailbox import Mailbox, Post
from paraserve_backend.channel.transport import Frame, FrameKind, Outbox
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.hand_over import (
    Accepted,
    Expect,
    KvBlocks,
    LoopMessage,
    Offer,
    Withdraw,
)
from paraserve_backend.protocol.parameters import HandOverConfig
from tests.support.limits import HANG_S
from tests.support.ports import free_ports

PROMPT = "a prompt"
Heard = queue.SimpleQueue[LoopMessage]


@contextlib.contextmanager
def listening(
    tmp_path: Path,
) -> Iterator[tuple[Mailbox, CurveKeys, queue.SimpleQueue[LoopMessage]]]:
    key_file = tmp_path / "curve.key"
    key_file.write_bytes(b"\n".join(zmq.curve_keypair()))
    address = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    mailbox = Mailbox(HandOverConfig(inbox=address, key_file=key_file))
    heard: Heard = queue.SimpleQueue()

    def receive_blocks(message: KvBlocks | Expect) -> None:
        raise InvalidRequest("no") if isinstance(message, Expect) else RuntimeError(PROMPT)

    mailbox.start(heard.put, receive_blocks)
    yield mailbox, CurveKeys.read(key_file), heard
    mailbox.stop()
    mailbox.close()


@pytest.mark.parametrize(
    "frame",
    [
        Frame(kind=FrameKind.FORWARD, number=1, body=PROMPT.encode()),
        Frame(kind=FrameKind.LOST, number=1, body=b""),
        Frame(kind=FrameKind.OFFER, number=1, body=b"1"),
        Frame(kind=FrameKind.OFFER, number=1, body=b"\1\0\0\0\xff\xfe"),
        Frame(kind=FrameKind.REFUSED, number=1, body=b"\xff"),
        Frame(kind=FrameKind.KV_BLOCKS, number=1, body=b""),
        Frame(kind=FrameKind.KV_BLOCKS, number=1, body=bytes(16), payload=PROMPT.encode()),
        Frame(kind=FrameKind.EXPECT, number=1, body=bytes(8)),
        Frame(kind=FrameKind.COMPLETE, number=1, body=bytes(9)),
    ],
    ids=lambda frame: f"{frame.kind.name}-{len(frame.body)}",
)
def test_a_message_that_cannot_be_taken_is_dropped_and_the_next_one_is_heard(
    tmp_path: Path, frame: Frame, caplog: pytest.LogCaptureFixture
) -> None:
    with listening(tmp_path) as (mailbox, keys, heard):
        outbox = Outbox(address=mailbox.address, keys=keys)
        outbox.send(frame)
        outbox.send(Frame(kind=FrameKind.WITHDRAW, number=7, body=b""))
        assert heard.get(timeout=HANG_S) == Withdraw(ticket=7)
        outbox.close()
    assert PROMPT not in caplog.text


@pytest.mark.parametrize("address", ["", "nowhere", "tcp://127.0.0.1:x"])
def test_a_message_to_no_address_is_lost_and_nothing_else(address: str, tmp_path: Path) -> None:
    with listening(tmp_path) as (mailbox, keys, heard):
        post = Post(keys)
        post.send(address, Accepted(ticket=1))
        post.send(mailbox.address, Offer(ticket=2, num_blocks=1, reply_to=address))
        assert heard.get(timeout=HANG_S) == Offer(ticket=2, num_blocks=1, reply_to=address)
        post.close()
