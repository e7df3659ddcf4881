"""Which requests each replica has, and which requests wait for one, in order.

Only books: `routes` decides who gets a replica, `silence` which replicas say nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from paraserve_backend.errors import ParaServeError
from paraserve_backend.rpc import paraserve_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a request needs of a replica."""

    #: Replicas that it must not get.
    refused: frozenset[str] = frozenset()
    #: One more that it gets only if no other comes in a while.
    avoided: str | None = None
    #: It has had a replica: it goes before those that have not, and is never refused.
    is_resumed: bool = False
    #: What it holds while it waits.
    held_bytes: int = 0
    #: Whether it can still go on at another replica.
    may_leave: Callable[[], bool] = lambda: True


@dataclass(slots=True, eq=False, kw_only=True)
class Lease:
    """One request at one replica. `end` takes the replica from it."""

    deployment: str
    endpoint: pb.Endpoint
    may_leave: Callable[[], bool]
    #: Ends what is counted for it.
    counted: contextlib.ExitStack
    #: When it last had a response, by the clock of `Leases`; before the first, when it began.
    heard_s: float = 0.0
    #: Whether a response is on its way to the client, who may take it late.
    is_delivering: bool = False
    loss: ParaServeError | None = None
    limit: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))

    @property
    def replica(self) -> str:
        return self.endpoint.replica

    def end(self, loss: ParaServeError) -> None:
        """Make its body end with this error."""
        if self.loss is None:
            self.loss = loss
            self.limit.reschedule(asyncio.get_running_loop().time())


class Leases:
    """By replica, those longest without a response first. Every change takes constant time."""

    def __init__(self) -> None:
        #: Seconds in which the gateway ran; `silence` advances it. What came while the gateway
        #: stood still has not been read yet, so that time is no silence.
        self.now_s = 0.0
        self._by_replica: dict[str, OrderedDict[Lease, None]] = {}
        #: When a replica last sent anything to any of them.
        self._answered_s: dict[str, float] = {}

    @property
    def replicas(self) -> tuple[str, ...]:
        """Those that have requests."""
        return tuple(self._by_replica)

    def of(self, replica: str) -> Iterator[Lease]:
        return iter(self._by_replica.get(replica, ()))

    def silent_s(self, replica: str) -> float:
        """How long the request that has waited longest has had no response from it."""
        oldest = next(self.of(replica), None)
        return 0.0 if oldest is None else self.now_s - oldest.heard_s

    def has_answered_since(self, replica: str, time_s: float) -> bool:
        """Whether any of its requests has had a response after this time."""
        return self._answered_s.get(replica, 0.0) > time_s

    def add(self, lease: Lease) -> None:
        lease.heard_s = self.now_s
        self._by_replica.setdefault(lease.replica, OrderedDict())[lease] = None

    def heard(self, lease: Lease) -> None:
        """Note a response, which the client gets now."""
        self._answered_s[lease.replica] = self.now_s
        self._note(lease)
        lease.is_delivering = True

    def delivered(self, lease: Lease) -> None:
        """Note that the client has it: only from now on the replica is waited for."""
        lease.is_delivering = False
        self._note(lease)

    def _note(self, lease: Lease) -> None:
        lease.heard_s = self.now_s
        self._by_replica[lease.replica].move_to_end(lease)

    def remove(self, lease: Lease) -> None:
        leases = self._by_replica[lease.replica]
        del leases[lease]
        if not leases:
            del self._by_replica[lease.replica]
            self._answered_s.pop(lease.replica, None)


@dataclass(slots=True, eq=False, kw_only=True)
class Waiter:
    """One request that waits for a replica."""

    wish: Wish
    #: Of its deployment, when it began to wait.
    failure_number: int
    counted: contextlib.ExitStack
    granted: asyncio.Future[Lease]
    #: Whether it still hopes for another replica than the one it avoids.
    is_avoiding: bool = True

    @property
    def refused(self) -> frozenset[str]:
        wish = self.wish
        if wish.avoided is None or not self.is_avoiding:
            return wish.refused
        return wish.refused | {wish.avoided}


class Line:
    """Those that wait for replicas of one deployment: first come, first served.

    Requests that have had a replica stand before those that have not.
    """

    def __init__(self, failure_number: int) -> None:
        #: Of the deployment's newest failed start that its waiters have been told of.
        self.failure_number = failure_number
        self._resumed: OrderedDict[Waiter, None] = OrderedDict()
        self._fresh: OrderedDict[Waiter, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._resumed) + len(self._fresh)

    def __iter__(self) -> Iterator[Waiter]:
        yield from self._resumed
        yield from self._fresh

    def add(self, waiter: Waiter) -> None:
        self._lane(waiter)[waiter] = None

    def discard(self, waiter: Waiter) -> None:
        """Take it out, wherever it stands; nothing of it remains."""
        self._lane(waiter).pop(waiter, None)
        waiter.counted.close()

    def _lane(self, waiter: Waiter) -> OrderedDict[Waiter, None]:
        return self._resumed if waiter.wish.is_resumed else self._fresh
