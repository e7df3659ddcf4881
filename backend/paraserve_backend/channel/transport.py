"""Frames over ZeroMQ: the activation channel between stages, and messages between replicas.

An inbox binds, an outbox connects (PUSH/PULL over TCP). Each member of the activation channel has
one of each; frames go one way around the ring link → stage 1 → … → last stage → link. CURVE
encrypts, and admits only processes that have the deployment's key pair. Sizes, time limits and the
form of a frame (header, body, tensor bytes in pieces) are decided here.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import zmq
import zmq.auth.thread
from zmq.utils.monitor import recv_monitor_message

from paraserve_backend.channel.keys import CurveKeys
from paraserve_backend.errors import InvalidRequest, Unavailable

logger = logging.getLogger(__name__)
_HEADER = struct.Struct("<HBxIQ")
_MAGIC = 0x5053
_POLL_MS = 200
_HEARTBEAT_MS = 1000
#: First and longest pause before connecting again. The members of a ring bind in any order, and a
#: first token would wait for ZeroMQ's own 100 ms.
_RECONNECT_MS = (5, 50)
_SEND_TIMEOUT_S = 10.0
_QUEUED_FRAMES = 64
#: ZeroMQ encrypts, sends and decrypts part by part: with several the three overlap.
_PART_BYTES = 256 << 10

Buffer = bytes | bytearray | memoryview


class FrameKind(IntEnum):
    FORWARD = 1  # body: ForwardBatch, payload: hidden states
    RESULT = 2  # body: ForwardResult
    ERROR = 3  # body: one sentence, UTF-8
    # `paraserve_backend.protocol.hand_over`
    OFFER = 4
    ACCEPTED = 5
    REFUSED = 6
    KV_BLOCKS = 7
    EXPECT = 8
    COMPLETE = 9
    WITHDRAW = 10
    LOST = 11  # a member of the ring lost the connection before it, and what was on its way there


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    kind: FrameKind
    #: Of a forward pass, chosen by the link and carried back by its result; or of a ticket.
    number: int
    body: Buffer
    payload: Buffer = b""


class _OnlyUs:
    """ZAP credentials provider: a peer must prove that it holds the deployment's own key pair."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


class Admissions:
    """Follows which connections of a socket have shown our keys, by what its monitor tells.

    ZeroMQ does not say whose handshake succeeded. Where it may be one of several, those that go are
    taken for strangers until one is left: no stranger's going is ever taken for a loss.
    """

    def __init__(self) -> None:
        #: File descriptors of connections, as all here.
        self._unknown: set[int] = set()
        self._admitted: set[int] = set()
        #: In each, one is admitted.
        self._groups: list[set[int]] = []

    def accepted(self, descriptor: int) -> None:
        self._unknown.add(descriptor)

    def handshake_succeeded(self) -> None:
        self._groups.append(self._unknown)
        self._unknown = set()
        self._resolve()

    def ended(self, descriptor: int) -> bool:
        """Return whether one that had our keys is lost with it."""
        is_loss = descriptor in self._admitted
        for members in (self._unknown, self._admitted, *self._groups):
            members.discard(descriptor)
        self._resolve()
        return is_loss

    def _resolve(self) -> None:
        for group in self._groups:
            if len(group) == 1:
                self._admitted |= group
        self._groups = [group for group in self._groups if len(group) > 1]


class _Monitor:
    """Hears of the connections of a socket that has been bound."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._admissions = Admissions()
        self._events = socket.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )

    def has_lost(self) -> bool:
        """Tell whether a connection was lost since the last call."""
        losses = 0
        while self._events.poll(0):
            event = recv_monitor_message(self._events)
            match event["event"]:
                case zmq.EVENT_ACCEPTED:
                    self._admissions.accepted(event["value"])
                case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self._admissions.handshake_succeeded()
                case _:
                    losses += self._admissions.ended(event["value"])
        return losses > 0


class Inbox:
    """Receives frames on one thread."""

    def __init__(
        self, *, listen: str, keys: CurveKeys, max_bytes: int, tells_losses: bool = False
    ) -> None:
        """Bind.

        Args:
            listen: `tcp://host:port`.
            keys: the deployment's.
            max_bytes: of one part of a frame.
            tells_losses: whether a lost connection comes in as a frame of kind LOST.
        """
        self._context = zmq.Context()
        self._authenticator = zmq.auth.thread.ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", _OnlyUs(keys.public))
        self._socket = _socket(self._context, zmq.PULL, keys)
        self._socket.curve_server = True
        self._socket.maxmsgsize = max_bytes
        self._socket.rcvtimeo = _POLL_MS
        self._monitor = _Monitor(self._socket) if tells_losses else None
        self._socket.bind(listen)

    def receive(self) -> Frame | None:
        """Wait a moment for a frame; `None` gives the caller a chance to stop.

        A malformed frame is dropped and logged.
        """
        # What came before a loss is taken before it.
        parts = self._parts(zmq.NOBLOCK)
        if parts is None:
            if self._monitor is not None and self._monitor.has_lost():
                return Frame(kind=FrameKind.LOST, number=0, body=b"")
            parts = self._parts()
        if parts is None:
            return None
        try:
            return _decode(parts)
        except ValueError as error:
            logger.warning("a frame was dropped: %s", error)
            return None

    def _parts(self, flags: int = 0) -> list[memoryview] | None:
        try:
            return [part.buffer for part in self._socket.recv_multipart(flags, copy=False)]
        except zmq.Again:
            return None

    def close(self) -> None:
        self._authenticator.stop()
        self._context.destroy(linger=0)


class Outbox:
    """Sends frames to one inbox; used by one thread at a time."""

    def __init__(
        self,
        *,
        address: str,
        keys: CurveKeys,
        queued_frames: int = _QUEUED_FRAMES,
        timeout_s: float = _SEND_TIMEOUT_S,
    ) -> None:
        """Connect in the background.

        Args:
            address: of the inbox, `tcp://host:port`.
            keys: the deployment's.
            queued_frames: how many may wait for the other side to take them.
            timeout_s: how long `send` then waits.

        Raises:
            InvalidRequest: the address is malformed.
        """
        self._context = zmq.Context()
        self._socket = _socket(self._context, zmq.PUSH, keys)
        self._socket.curve_serverkey = keys.public
        self._socket.sndhwm = queued_frames
        self._socket.sndtimeo = round(timeout_s * 1000)
        try:
            self._socket.connect(address)
        except (zmq.ZMQError, ValueError):
            self.close()
            raise InvalidRequest(f"{address[:100]!r} is no address of an inbox.") from None

    def send(self, frame: Frame) -> None:
        """Queue a frame.

        Raises:
            Unavailable: the queue is full and the other side took nothing in time.
        """
        header = _HEADER.pack(_MAGIC, frame.kind, 0, frame.number)
        try:
            self._socket.send_multipart([header, frame.body, *_parts(frame.payload)], copy=False)
        except zmq.Again:
            raise Unavailable("The next pipeline stage does not answer.") from None

    def close(self) -> None:
        self._context.destroy(linger=0)


def _socket(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, keys: CurveKeys
) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.curve_publickey = keys.public
    socket.curve_secretkey = keys.secret
    socket.sndhwm = socket.rcvhwm = _QUEUED_FRAMES
    socket.linger = 0
    socket.heartbeat_ivl = _HEARTBEAT_MS
    socket.heartbeat_timeout = 3 * _HEARTBEAT_MS
    socket.reconnect_ivl, socket.reconnect_ivl_max = _RECONNECT_MS
    return socket


class Channel:
    """A member of the ring. `send` and `receive` may be used by one thread each."""

    def __init__(self, *, listen: str, next_address: str, keys: CurveKeys, max_bytes: int) -> None:
        self._inbox = Inbox(listen=listen, keys=keys, max_bytes=max_bytes, tells_losses=True)
        self._outbox = Outbox(address=next_address, keys=keys)
        self.receive = self._inbox.receive
        self.send = self._outbox.send

    def close(self) -> None:
        self._inbox.close()
        self._outbox.close()


def _parts(payload: Buffer) -> list[memoryview]:
    view = memoryview(payload)
    return [view[at : at + _PART_BYTES] for at in range(0, len(view), _PART_BYTES)]


def _decode(parts: list[memoryview]) -> Frame:
    if len(parts) < 2 or len(parts[0]) != _HEADER.size:
        raise ValueError("an activation frame has a header and a body")
    magic, kind, _, number = _HEADER.unpack(parts[0])
    if magic != _MAGIC:
        raise ValueError("not an activation frame")
    _, body, *payload = parts
    joined = payload[0] if len(payload) == 1 else bytearray().join(payload)
    return Frame(kind=FrameKind(kind), number=number, body=body, payload=joined)


def relay(channel: Channel, step: Callable[[Frame], Frame], stopped: Callable[[], bool]) -> None:
    """Serve a stage: turn each FORWARD frame into the next one; pass others along untouched.

    `step` raises nothing. A frame that the next member does not take is lost, as it is when that
    member goes: the link settles its pass.
    """
    while not stopped():
        frame = channel.receive()
        if frame is None:
            continue
        try:
            channel.send(step(frame) if frame.kind is FrameKind.FORWARD else frame)
        except Unavailable as error:
            logger.warning("a frame was dropped: %s", error)
