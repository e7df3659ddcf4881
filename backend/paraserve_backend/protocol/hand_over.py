"""What replicas say to each other while a running request moves from one to the other.

The source offers a sequence, its stages send KV blocks, and the target says when it has all of
them. A ticket names one sequence on its way. When a sequence moves is decided in
`engines.native.handover_source`; `channel` brings the messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from paraserve_backend.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A replica that takes requests over."""

    replica: str
    #: Of its inbox, `tcp://host:port`; empty where its engine takes no KV blocks.
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Source to target: keep this many KV blocks for a sequence; may be raised later."""

    ticket: int
    num_blocks: int
    #: The source's inbox.
    reply_to: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    ticket: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The target has no room, or no longer knows the ticket."""

    ticket: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KvBlocks:
    """A stage to the target: `num_blocks` blocks of a sequence from its block `first` on.

    `payload` is `[end - start layers, 2, num_blocks, block_size, kv_heads, head_dim]`, raw.
    """

    ticket: int
    layer_start: int
    layer_end: int
    first: int
    num_blocks: int
    payload: bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Expect:
    """Source to target: say `Complete` when so many blocks, counted once per layer, have come."""

    ticket: int
    layer_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Complete:
    ticket: int
    layer_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw:
    """Source to target: the sequence stays, or has ended."""

    ticket: int


#: Messages to the generate loop; the others go to its handover target at once.
LoopMessage = Offer | Accepted | Refused | Complete | Withdraw
Message = LoopMessage | KvBlocks | Expect
#: Sends a message to an inbox, by its address.
SendMessage = Callable[[str, Message], None]


def read_targets(command: str) -> tuple[Target, ...]:
    """Read the command that has a replica hand its requests over.

    It is JSON, `{"hand_over": [{"replica": "d.2", "address": "tcp://host:port"}, ...]}`.

    Raises:
        InvalidRequest: it is not that.
    """
    try:
        return tuple(Target(**entry) for entry in json.loads(command)["hand_over"])
    except (ValueError, TypeError, KeyError):
        raise InvalidRequest(
            'A command is {"hand_over": [{"replica": ..., "address": ...}]} and nothing else.'
        ) from None
