"""The activation channel: hidden states from stage to stage, the result back to the head's link.

ZeroMQ PUSH/PULL over TCP, one direction around the ring link → stage 1 → … → last stage → link.
CURVE encrypts and authenticates: all members of a replica share one key pair and accept nobody
else. A frame is a fixed header, the encoded batch or result, and raw hidden states in parts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import zmq
import zmq.auth.thread

from paraserve_backend.errors import InvalidRequest, Unavailable

_HEADER = struct.Struct("<HBxIQ")
_MAGIC = 0x5053
_POLL_MS = 200
_HEARTBEAT_MS = 1000
_SEND_TIMEOUT_MS = 10_000
_QUEUED_FRAMES = 64
#: ZeroMQ encrypts, sends and decrypts part by part: with several the three overlap.
_PART_BYTES = 256 << 10

Buffer = bytes | bytearray | memoryview


class FrameKind(IntEnum):
    FORWARD = 1  # body: ForwardBatch, payload: hidden states
    RESULT = 2  # body: ForwardResult
    ERROR = 3  # body: one sentence, UTF-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    kind: FrameKind
    #: Chosen by the link; the result carries the number of its forward pass.
    number: int
    body: Buffer
    payload: Buffer = b""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CurveKeys:
    """One replica's key pair, Z85."""

    public: bytes
    secret: bytes

    @classmethod
    def read(cls, path: Path) -> CurveKeys:
        """Read the file the agent wrote: the public key, then the secret one, a line each."""
        lines = path.read_bytes().split()
        if len(lines) != 2:
            raise InvalidRequest("The channel's key file is malformed; remove the replica.")
        return cls(public=lines[0], secret=lines[1])


class _OnlyUs:
    """ZAP credentials provider: a peer must prove that it holds the replica's own key pair."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


class Channel:
    """One member's two sockets. `send` and `receive` may be used by one thread each."""

    def __init__(self, *, listen: str, next_address: str, keys: CurveKeys, max_bytes: int) -> None:
        self._context = zmq.Context()
        self._authenticator = zmq.auth.thread.ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", _OnlyUs(keys.public))
        self._receiver = self._socket(zmq.PULL, keys)
        self._receiver.curve_server = True
        self._receiver.maxmsgsize = max_bytes
        self._receiver.rcvtimeo = _POLL_MS
        self._receiver.bind(listen)
        self._sender = self._socket(zmq.PUSH, keys)
        self._sender.curve_serverkey = keys.public
        self._sender.sndtimeo = _SEND_TIMEOUT_MS
        self._sender.connect(next_address)

    def _socket(self, kind: int, keys: CurveKeys) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.curve_publickey = keys.public
        socket.curve_secretkey = keys.secret
        socket.sndhwm = socket.rcvhwm = _QUEUED_FRAMES
        socket.linger = 0
        socket.heartbeat_ivl = _HEARTBEAT_MS
        socket.heartbeat_timeout = 3 * _HEARTBEAT_MS
        return socket

    def send(self, frame: Frame) -> None:
        """Queue a frame for the next member.

        Raises:
            Unavailable: the next member has not taken frames for ten seconds.
        """
        header = _HEADER.pack(_MAGIC, frame.kind, 0, frame.number)
        try:
            self._sender.send_multipart([header, frame.body, *_parts(frame.payload)], copy=False)
        except zmq.Again:
            raise Unavailable("The next pipeline stage does not answer.") from None

    def receive(self) -> Frame | None:
        """Wait a moment for a frame; `None` gives the caller a chance to stop.

        Raises:
            ValueError: the frame is not one of ours.
        """
        try:
            parts = self._receiver.recv_multipart(copy=False)
        except zmq.Again:
            return None
        return _decode([part.buffer for part in parts])

    def close(self) -> None:
        self._authenticator.stop()
        self._context.destroy(linger=0)


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
    """Serve a stage: turn each FORWARD frame into the next one; pass errors along untouched."""
    while not stopped():
        frame = channel.receive()
        if frame is None:
            continue
        channel.send(step(frame) if frame.kind is FrameKind.FORWARD else frame)
