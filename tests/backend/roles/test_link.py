"""The link when the ring breaks, or says what it should not."""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zmq

from paraserve_backend.channel.keys import CurveKeys
from paraserve_backend.channel.transport import Buffer, Channel, Frame, FrameKind
from paraserve_backend.errors import ParaServeError, Unavailable
from paraserve_backend.protocol.parameters import ChannelConfig, LinkConfig
from paraserve_backend.roles.link import LinkRole
from tests.support.limits import HANG_S
from tests.support.ports import free_ports

Said = Buffer | ParaServeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """A link, and its one stage, which the test plays."""

    link: LinkRole
    stage: Channel

    def forward(self) -> tuple[int, queue.SimpleQueue[Said]]:
        """Begin a pass; returns its number in the channel and what it is answered."""
        said: queue.SimpleQueue[Said] = queue.SimpleQueue()
        self.link.forward(b"batch", np.zeros((1, 4), np.uint8), said.put)
        while (frame := self.stage.receive()) is None or frame.kind is not FrameKind.FORWARD:
            pass
        return frame.number, said

    def answer(self, number: int) -> None:
        self.stage.send(Frame(kind=FrameKind.RESULT, number=number, body=b"result"))


@contextlib.contextmanager
def open_ring(tmp_path: Path, forward_timeout_s: float) -> Iterator[Ring]:
    key_file = tmp_path / "curve.key"
    key_file.write_bytes(b"\n".join(zmq.curve_keypair()))
    first, second = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
    channel = ChannelConfig(listen=first, next=second, key_file=key_file)
    link = LinkRole(LinkConfig(replica="d.1", channel=channel, forward_timeout_s=forward_timeout_s))
    stage = Channel(
        listen=second, next_address=first, keys=CurveKeys.read(key_file), max_bytes=1 << 20
    )
    yield Ring(link=link, stage=stage)
    stage.close()
    link.close()


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Ring]:
    with open_ring(tmp_path, HANG_S) as ring:
        yield ring


def assert_serves(ring: Ring) -> None:
    number, said = ring.forward()
    ring.answer(number)
    outcome = said.get(timeout=HANG_S)
    assert not isinstance(outcome, ParaServeError)
    assert bytes(outcome) == b"result"


def test_passes_end_at_once_when_the_last_stage_is_lost(ring: Ring) -> None:
    assert_serves(ring)
    _, said = ring.forward()
    _, other = ring.forward()
    ring.stage._outbox.close()
    for each in (said, other):
        error = each.get(timeout=HANG_S)
        assert isinstance(error, Unavailable)
        assert str(error) == "The pipeline lost the connection to a stage."


def test_passes_end_at_once_when_a_stage_in_the_middle_is_lost(ring: Ring) -> None:
    _, said = ring.forward()
    ring.stage.send(Frame(kind=FrameKind.LOST, number=0, body=b""))
    assert isinstance(said.get(timeout=HANG_S), Unavailable)
    assert_serves(ring)


def test_a_pass_that_is_never_answered_can_go_on_elsewhere(tmp_path: Path) -> None:
    with open_ring(tmp_path, 0.01) as ring:
        _, said = ring.forward()
        error = said.get(timeout=HANG_S)
        assert isinstance(error, Unavailable)
        assert str(error) == "The pipeline gave no answer within 0.01 s."


@pytest.mark.parametrize(
    "frame",
    [
        Frame(kind=FrameKind.OFFER, number=1, body=b"\xff"),
        Frame(kind=FrameKind.FORWARD, number=1, body=b"\xff"),
        Frame(kind=FrameKind.RESULT, number=99, body=b"of nobody"),
        Frame(kind=FrameKind.ERROR, number=99, body=b"\xff"),
    ],
    ids=lambda frame: frame.kind.name,
)
def test_a_frame_that_makes_no_sense_ends_nothing(ring: Ring, frame: Frame) -> None:
    ring.stage.send(frame)
    assert_serves(ring)


def test_a_sentence_of_a_stage_that_is_no_utf8_is_an_error_all_the_same(ring: Ring) -> None:
    number, said = ring.forward()
    ring.stage.send(Frame(kind=FrameKind.ERROR, number=number, body=b"stage \xff failed"))
    error = said.get(timeout=HANG_S)
    assert isinstance(error, Unavailable)
    assert str(error) == "stage \ufffd failed"


def test_an_answer_that_cannot_be_given_ends_nothing(ring: Ring) -> None:
    def raises(_outcome: Said) -> None:
        raise RuntimeError("the sender is gone")

    ring.link.forward(b"batch", np.zeros((1, 4), np.uint8), raises)
    while (frame := ring.stage.receive()) is None:
        pass
    ring.answer(frame.number)
    assert_serves(ring)


STAGE = """
import sys
from pathlib import Path
from paraserve_backend.channel.keys import CurveKeys
from paraserve_backend.channel.transport import Channel

listen, following, key_file = sys.argv[1:]
keys = CurveKeys.read(Path(key_file))
channel = Channel(listen=listen, next_address=following, keys=keys, max_bytes=1 << 20)
while True:
    if channel.receive() is not None:
        print("has a pass", flush=True)
"""


def test_passes_end_in_seconds_when_the_last_stage_is_stopped(tmp_path: Path) -> None:
    """Nothing else would end this one: its time limit is a hang's."""
    key_file = tmp_path / "curve.key"
    key_file.write_bytes(b"\n".join(zmq.curve_keypair()))
    first, second = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
    channel = ChannelConfig(listen=first, next=second, key_file=key_file)
    link = LinkRole(LinkConfig(replica="d.1", channel=channel, forward_timeout_s=1e9))
    arguments = [sys.executable, "-c", STAGE, second, first, str(key_file)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as stage:
        said: queue.SimpleQueue[Said] = queue.SimpleQueue()
        link.forward(b"batch", np.zeros((1, 4), np.uint8), said.put)
        assert stage.stdout is not None
        assert stage.stdout.readline() == b"has a pass\n"
        # It has sent nothing yet, but its connection to the link must stand.
        while not has_friend(link):
            pass
        stage.send_signal(signal.SIGSTOP)
        assert isinstance(said.get(timeout=HANG_S), Unavailable)
        stage.kill()
    link.close()


def has_friend(link: LinkRole) -> bool:
    monitor = link._channel._inbox._monitor
    assert monitor is not None
    return bool(monitor._admissions._admitted)
