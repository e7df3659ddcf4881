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
    PostMessage,
    Refused,
)

logger = logging.getLogger(__name__)

#: Longer than a source waits for a copy, and than a gateway takes to follow.
_UNCLAIMED_S = 60.0

#: Writes received KV blocks into these blocks of the cache; raises `InvalidRequest`.
Write = Callable[[KvBlocks, list[int]], None]


@dataclass(slots=True, kw_only=True, eq=False)
class _Arrival:
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


class Arrivals:
    def __init__(
        self,
        pool: BlockPool,
        write: Write | None,
        post: PostMessage,
        now_s: Callable[[], float],
    ) -> None:
        """Begin with none.

        Args:
            pool: the loop's.
            write: `None` where the KV cache lies in other processes: sequences then come bare.
            post: sends a message to an inbox.
            now_s: a monotonic clock.
        """
        self._pool = pool
        self._write = write
        self._post = post
        self._now_s = now_s
        #: Held while blocks are written, so that nobody frees them meanwhile.
        self._lock = threading.Lock()
        self._arrivals: dict[int, _Arrival] = {}

    @property
    def blocks(self) -> list[int]:
        """All that are kept."""
        return [block for arrival in self._arrivals.values() for block in arrival.blocks]

    # ---- the generate loop's thread ----

    def offered(self, offer: Offer) -> None:
        """Keep blocks for a sequence, or more of them."""
        with self._lock:
            arrival = self._arrivals.get(offer.ticket)
            held = arrival.blocks if arrival else []
            more = self._take(offer.num_blocks - len(held))
            if more is not None:
                arrival = arrival or _Arrival(reply_to=offer.reply_to, blocks=[], deadline_s=0.0)
                arrival.blocks.extend(more)
                arrival.deadline_s = self._now_s() + _UNCLAIMED_S
                self._arrivals[offer.ticket] = arrival
        if more is None:
            reason = "it cannot take KV blocks now"
            self._post(offer.reply_to, Refused(ticket=offer.ticket, reason=reason))
        else:
            self._post(offer.reply_to, Accepted(ticket=offer.ticket))

    def claim(self, ticket: int) -> list[int] | None:
        """Return the blocks of a sequence that is here now; `None` if they have not all come."""
        with self._lock:
            arrival = self._arrivals.pop(ticket, None)
        if arrival is None:
            return None
        if not arrival.is_complete:
            self._pool.give_back(arrival.blocks)
            return None
        return arrival.blocks

    def withdrawn(self, ticket: int) -> None:
        with self._lock:
            arrival = self._arrivals.pop(ticket, None)
        if arrival is not None:
            self._pool.give_back(arrival.blocks)

    def expire(self) -> None:
        now_s = self._now_s()
        for ticket, arrival in list(self._arrivals.items()):
            if arrival.deadline_s <= now_s:
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
            arrival = self._arrivals.get(message.ticket)
            if arrival is None:
                return
            if isinstance(message, Expect):
                arrival.expected = message.layer_blocks
            else:
                self._take_in(arrival, message)
            is_complete = arrival.is_complete
            layer_blocks = arrival.layer_blocks
        if is_complete:
            self._post(arrival.reply_to, Complete(ticket=message.ticket, layer_blocks=layer_blocks))

    def _take_in(self, arrival: _Arrival, message: KvBlocks) -> None:
        until = message.first + message.num_blocks
        if until > len(arrival.blocks):
            raise InvalidRequest("KV blocks came that nobody has offered.")
        assert self._write is not None, "no arrival without room"
        self._write(message, arrival.blocks[message.first : until])
        arrival.layer_blocks += message.num_blocks * (message.layer_end - message.layer_start)
