"""The hand-over messages between replicas as frames, and back."""

from __future__ import annotations

import struct

from paraserve_backend.channel.transport import Buffer, Frame, FrameKind
from paraserve_backend.protocol.hand_over import (
    Accepted,
    Complete,
    Expect,
    KvBlocks,
    Message,
    Offer,
    Refused,
    Withdraw,
)

_OFFER = struct.Struct("<I")
# first layer, end layer, first block, blocks
_KV = struct.Struct("<IIII")
_COUNT = struct.Struct("<Q")


def to_frame(message: Message) -> Frame:
    body: bytes = b""
    payload: Buffer = b""
    match message:
        case Offer():
            kind = FrameKind.OFFER
            body = _OFFER.pack(message.num_blocks) + message.reply_to.encode()
        case Accepted():
            kind = FrameKind.ACCEPTED
        case Refused():
            kind, body = FrameKind.REFUSED, message.reason.encode()
        case KvBlocks():
            kind, payload = FrameKind.KV_BLOCKS, message.payload
            body = _KV.pack(
                message.layer_start, message.layer_end, message.first, message.num_blocks
            )
        case Expect():
            kind, body = FrameKind.EXPECT, _COUNT.pack(message.layer_blocks)
        case Complete():
            kind, body = FrameKind.COMPLETE, _COUNT.pack(message.layer_blocks)
        case Withdraw():
            kind = FrameKind.WITHDRAW
    return Frame(kind=kind, number=message.ticket, body=body, payload=payload)


def from_frame(frame: Frame) -> Message:
    """Reverse `to_frame`; raises ValueError on a frame that is no such message."""
    ticket, body = frame.number, bytes(frame.body)
    try:
        match frame.kind:
            case FrameKind.OFFER:
                (num_blocks,) = _OFFER.unpack_from(body)
                reply_to = body[_OFFER.size :].decode()
                return Offer(ticket=ticket, num_blocks=num_blocks, reply_to=reply_to)
            case FrameKind.ACCEPTED:
                return Accepted(ticket=ticket)
            case FrameKind.REFUSED:
                return Refused(ticket=ticket, reason=body.decode())
            case FrameKind.KV_BLOCKS:
                start, end, first, num_blocks = _KV.unpack(body)
                return KvBlocks(
                    ticket=ticket,
                    layer_start=start,
                    layer_end=end,
                    first=first,
                    num_blocks=num_blocks,
                    payload=frame.payload,
                )
            case FrameKind.EXPECT:
                return Expect(ticket=ticket, layer_blocks=_COUNT.unpack(body)[0])
            case FrameKind.COMPLETE:
                return Complete(ticket=ticket, layer_blocks=_COUNT.unpack(body)[0])
            case FrameKind.WITHDRAW:
                return Withdraw(ticket=ticket)
            case _:
                raise ValueError(f"a frame of kind {frame.kind.name} hands nothing over")
    except struct.error as error:
        raise ValueError(f"a {frame.kind.name} frame is malformed: {error}") from None
