"""The target's side of a hand-over: KV blocks of sequences that come from another replica.

The blocks arrive before their request does, under a ticket. The generate loop's thread reserves and
claims them, the mailbox's thread writes into them. Blocks that no request claims in time are freed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from paraserve_backend.engines.native.batcher import BlockPool
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.hand_over import (
    Accepted,
    Complete,
    Expect,
    KvBlocks,
    Offer,
    Refused,
    SendMessage,
)

logger = logging.getLogger(__name__)

#: Longer than a source waits for a copy, and than a gateway takes to follow.
_UNCLAIMED_S = 60.0

#: Writes received KV blocks into these blocks of the cache; raises `InvalidRequest`.
Write = Callable[[KvBlocks, list[int]], None]


@dataclass(slots=True, kw_only=True, eq=False)
class _IncomingSequence:
    reply_to: str
    blocks: list[int]
    deadline_s: float
    #: Blocks that have come, counted once per layer.
    layer_blocks: int = 0
    #: How many the source has last said that it has sent.
    expected: int | None = None

    @property
    def is_complete(self) -> bool:
        return self.layer_blocks == self.expected


class HandOverTarget:
    def __init__(
        self,
        pool: BlockPool,
        write: Write | None,
        send: SendMessage,
        now_s: Callable[[], float],
    ) -> None:
        """Begin with none.

        Args:
            pool: the loop's.
            write: `None` where the KV cache lies in other processes: sequences then come bare.
            send: sends a message to an inbox.
            now_s: a monotonic clock.
        """
        self._pool = pool
        self._write = write
        self._send = send
        self._now_s = now_s
        #: Held while blocks are written, so that nobody frees them meanwhile.
        self._lock = threading.Lock()
        self._incoming: dict[int, _IncomingSequence] = {}

    @property
    def blocks(self) -> list[int]:
        """All that are kept."""
        return [block for incoming in self._incoming.values() for block in incoming.blocks]

    # ---- the generate loop's thread ----

    def offered(self, offer: Offer) -> None:
        """Keep blocks for a sequence, or more of them."""
        with self._lock:
            incoming = self._incoming.get(offer.ticket)
            held = incoming.blocks if incoming else []
            more = self._take(offer.num_blocks - len(held))
            if more is not None:
                incoming = incoming or _IncomingSequence(
                    reply_to=offer.reply_to, blocks=[], deadline_s=0.0
                )
                incoming.blocks.extend(more)
                incoming.deadline_s = self._now_s() + _UNCLAIMED_S
                self._incoming[offer.ticket] = incoming
        if more is None:
            reason = "it cannot take KV blocks now"
            self._send(offer.reply_to, Refused(ticket=offer.ticket, reason=reason))
        else:
            self._send(offer.reply_to, Accepted(ticket=offer.ticket))

    def claim(self, ticket: int) -> list[int] | None:
        """Return the blocks of a sequence that is here now; `None` if they have not all come."""
        with self._lock:
            incoming = self._incoming.pop(ticket, None)
        if incoming is None:
            return None
        if not incoming.is_complete:
            self._pool.give_back(incoming.blocks)
            return None
        return incoming.blocks

    def withdrawn(self, ticket: int) -> None:
        with self._lock:
            incoming = self._incoming.pop(ticket, None)
        if incoming is not None:
            self._pool.give_back(incoming.blocks)

    def expire(self) -> None:
        now_s = self._now_s()
        for ticket, incoming in list(self._incoming.items()):
            if incoming.deadline_s <= now_s:
                logger.warning("nobody has come for the KV blocks of ticket %d", ticket)
                self.withdrawn(ticket)

    def _take(self, count: int) -> list[int] | None:
        return None if self._write is None else self._pool.take(max(0, count))

    # ---- the inbox's thread ----

    def received(self, message: KvBlocks | Expect) -> None:
        """Take blocks in, or the number of blocks to wait for; tell the source when all are here.

        Raises:
            InvalidRequest: the blocks do not fit this replica's cache.
        """
        with self._lock:
            incoming = self._incoming.get(message.ticket)
            if incoming is None:
                return
            if isinstance(message, Expect):
                incoming.expected = message.layer_blocks
            else:
                self._take_in(incoming, message)
            is_complete = incoming.is_complete
            layer_blocks = incoming.layer_blocks
        if is_complete:
            self._send(
                incoming.reply_to, Complete(ticket=message.ticket, layer_blocks=layer_blocks)
            )

    def _take_in(self, incoming: _IncomingSequence, message: KvBlocks) -> None:
        until = message.first + message.num_blocks
        if until > len(incoming.blocks):
            raise InvalidRequest("KV blocks came that nobody has offered.")
        assert self._write is not None, "no arrival without room"
        self._write(message, incoming.blocks[message.first : until])
        incoming.layer_blocks += message.num_blocks * (message.layer_end - message.layer_start)
