"""The fetches of this node by their ids: each runs in a thread and fills the host-memory tier.

This module starts, joins, stops and releases fetches and reserves memory for them. The scheduler
decides what to fetch. Released bytes stay in memory or on disk while there is room.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from paraserve_backend.agent.status import tier_messages
from paraserve_backend.daemon.tasks import in_thread
from paraserve_backend.errors import AlreadyExists, NotFound
from paraserve_backend.protocol.names import replica_of
from paraserve_backend.protocol.run_dir import TierDir
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.telemetry.spans import Span, SpanFile, SpanName
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan
from paraserve_backend.weights.fetching.fetch import FetchReport, fetch
from paraserve_backend.weights.sources.base import Source
from paraserve_backend.weights.sources.open import Sources
from paraserve_backend.weights.sources.peer import HttpPeer
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.memory import Tier

#: Fetches at once; the rest wait. Each only watches its own threads.
_MOST_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRequest:
    """What to fetch and how to reach its source; None is what the environment says."""

    plan: FetchPlan
    endpoint_url: str | None
    region: str | None
    #: Nobody waits for it: it takes one connection, whatever the node's setting.
    background: bool = False
    #: host:port of agents that may have some of the bytes. What was true when the fetch was first
    #: asked for need not be so when it is asked for again.
    peers: tuple[str, ...] = field(default=(), compare=False)
    #: Memory that the fetch's replica may use here, its weights included.
    reserved_bytes: int = field(default=0, compare=False)

    @classmethod
    def from_message(cls, message: pb.Fetch) -> FetchRequest:
        """Read a request; raises `InvalidRequest` where the plan is not one."""
        return cls(
            plan=FetchPlan.from_json(message.plan_json),
            endpoint_url=message.endpoint_url or None,
            region=message.region or None,
            background=message.background,
            peers=tuple(message.peers),
            reserved_bytes=message.reserved_bytes,
        )

    def open(self, sources: Sources) -> Source:
        return sources.open(
            self.plan.source_uri, endpoint_url=self.endpoint_url, region=self.region
        )


class Fetching:
    """One fetch on its way. Lives on the event loop; `told` is called from the fetch's thread."""

    def __init__(self, request: FetchRequest) -> None:
        self.request = request
        self.cancelled = threading.Event()
        self._begun = asyncio.Event()
        self._can_be_found = False
        self.task: asyncio.Future[int] | None = None
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Callable[[int, int], None]] = []
        self._progress: tuple[int, int] | None = None

    def listen(self, on_progress: Callable[[int, int], None]) -> None:
        """Have the landed and the total bytes told, the newest at once."""
        self._listeners.append(on_progress)
        if self._progress is not None:
            on_progress(*self._progress)

    async def until_begun(self) -> None:
        """Wait until readers can find the fetch; raises why they never will."""
        await self._begun.wait()
        if not self._can_be_found:
            await self.wait()

    async def wait(self) -> int:
        """Return how many bytes were fetched, or raise why not; a cancelled wait ends nothing."""
        assert self.task is not None, "a fetch is handed out once it runs"
        return await asyncio.shield(self.task)

    async def stop(self) -> None:
        """End the fetch; it is no error if it has ended. Readers raise `Cancelled`."""
        assert self.task is not None, "a fetch is handed out once it runs"
        self.cancelled.set()
        await asyncio.wait([self.task])

    def has_ended(self, task: asyncio.Future[int]) -> None:
        self._begun.set()
        if not task.cancelled():
            task.exception()  # looked at: if nobody waits for it, the fetch was stopped

    def set_begun(self) -> None:
        self._loop.call_soon_threadsafe(self._set_begun)

    def _set_begun(self) -> None:
        self._can_be_found = True
        self._begun.set()

    def told(self, landed_bytes: int, total_bytes: int) -> None:
        self._loop.call_soon_threadsafe(self._tell, landed_bytes, total_bytes)

    def _tell(self, landed_bytes: int, total_bytes: int) -> None:
        self._progress = (landed_bytes, total_bytes)
        for listener in self._listeners:
            listener(landed_bytes, total_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """What the fetches of a node may use."""

    #: Connections to the store, each fetch.
    threads: int
    #: Of what no fetch needs any more, so much may stay in memory.
    tier_bytes: int = 0
    #: Replicas and what stays may together use so much.
    memory_bytes: int = 0
    #: Inbound; None: not known.
    link_bytes_per_s: float | None = None


class Fetches:
    """The node's fetches by id, over its tier. `token` is what its peers know it by."""

    def __init__(
        self,
        tier: Tier,
        limits: FetchLimits,
        *,
        token: str | None = None,
        disk: DiskTier | None = None,
        sources: Sources | None = None,
    ) -> None:
        self._tier = tier
        self._dir = TierDir(tier.directory)
        self._sources = sources or Sources()
        self._disk = disk
        self._limits = limits
        self._token = token
        self._pool = ThreadPoolExecutor(_MOST_AT_ONCE, thread_name_prefix="fetch-watch")
        self._running: dict[str, Fetching] = {}
        #: What the replica of each fetch may use, by fetch id.
        self._reserved: dict[str, int] = {}
        self._lock = threading.Lock()

    async def start(self, request: FetchRequest, timeout_s: float) -> Fetching:
        """Start a fetch, or join the one that runs; returns when readers can find it.

        Raises:
            AlreadyExists: the id belongs to another plan.
            ParaServeError: why the source could not be opened, or that the node lacks memory.
        """
        fetch_id = request.plan.fetch_id
        fetching = self._running.get(fetch_id)
        if fetching is None:
            fetching = self._running[fetch_id] = self._spawn(request, timeout_s)
        elif fetching.request != request:
            raise AlreadyExists(f"fetch {fetch_id} is already running with another plan")
        await fetching.until_begun()
        return fetching

    async def prepare(self) -> None:
        """Have ready what the first fetch from an object store needs."""
        await in_thread(self._sources.prepare)

    async def stop(self, fetch_id: str) -> None:
        """End a fetch; one that does not run is no error."""
        fetching = self._running.get(fetch_id)
        if fetching is not None:
            await fetching.stop()

    async def release(self, fetch_id: str) -> bool:
        """Stop a fetch and free its memory; returns whether it was there.

        Only once no model reads it.
        """
        await self.stop(fetch_id)
        return await in_thread(lambda: self._release(fetch_id))

    async def release_replica(self, replica: str) -> bool:
        """Release the fetches of all stages of a replica; returns whether it had any."""
        ids = [fetch_id for fetch_id in self._ids() if replica_of(fetch_id) == replica]
        released = [await self.release(fetch_id) for fetch_id in ids]
        return any(released)

    async def release_all(self) -> None:
        for fetch_id in self._ids():
            await self.release(fetch_id)

    async def close(self) -> None:
        """Stop and release everything and give the tier back."""
        await self.release_all()
        self._pool.shutdown()
        await in_thread(self._tier.close)

    async def spans(self, fetch_id: str) -> tuple[Span, ...]:
        """Return what the processes that read a fetch have measured."""
        return await in_thread(SpanFile(self._dir.spans(fetch_id)).read)

    @property
    def is_fetching(self) -> bool:
        return bool(self._running)

    async def contents(self) -> tuple[list[pb.TierObject], int]:
        """Return the objects in the tier and on disk, and the bytes of memory they take."""
        return await in_thread(
            lambda: (
                tier_messages(self._tier, self._disk, self._sources),
                self._tier.used_bytes,
            )
        )

    @property
    def disk_used_bytes(self) -> int:
        return self._disk.used_bytes if self._disk else 0

    def _spawn(self, request: FetchRequest, timeout_s: float) -> Fetching:
        fetching = Fetching(request)
        fetching.task = asyncio.create_task(self._run(fetching, timeout_s))
        fetching.task.add_done_callback(fetching.has_ended)
        return fetching

    async def _run(self, fetching: Fetching, timeout_s: float) -> int:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, self._work, fetching, timeout_s)
        finally:
            # Before anybody learns of its end: who then asks for it again shall not join it.
            del self._running[fetching.request.plan.fetch_id]

    def _work(self, fetching: Fetching, timeout_s: float) -> int:
        request = fetching.request
        source = request.open(self._sources)
        writer = self._tier.begin(replace(request.plan, store=source.store))
        self._reserve(request)
        fetching.set_begun()
        started_s = time.time()
        report = fetch(
            writer,
            source,
            self._tier,
            timeout_s=timeout_s,
            cancel=fetching.cancelled,
            threads=1 if request.background else self._limits.threads,
            on_progress=fetching.told,
            peers=[HttpPeer(address=address, token=self._token) for address in request.peers],
            link_bytes_per_s=self._limits.link_bytes_per_s,
            disk=self._disk,
        )
        self._note(request.plan.fetch_id, report, started_s)
        return report.fetched_bytes

    def _note(self, fetch_id: str, report: FetchReport, started_s: float) -> None:
        """Write into the timeline where the bytes came from, unless all came from the store."""
        if not report.reused_bytes + report.disk_bytes + report.peer_bytes:
            return
        origins = {
            "tier": report.reused_bytes,
            "disk": report.disk_bytes,
            "peers": report.peer_bytes,
            "store": report.store_bytes,
        }
        spans = SpanFile(self._dir.spans(fetch_id))
        for origin, size_bytes in origins.items():
            if size_bytes:
                spans.append(
                    Span(
                        name=SpanName.FETCH_FROM,
                        detail=origin,
                        start_s=started_s,
                        end_s=started_s + report.total_s,
                        size_bytes=size_bytes,
                    )
                )

    def _release(self, fetch_id: str) -> bool:
        # First: what the replica leaves may stay where it was.
        self._unreserve(fetch_id)
        self._use_disk(fetch_id)
        try:
            self._tier.release(fetch_id)
        except NotFound:
            return False
        return True

    def _use_disk(self, fetch_id: str) -> None:
        """Have the disk, too, keep longest what was in use until now."""
        if self._disk is None:
            return
        for landing in self._tier.fetches():
            if landing.plan.fetch_id == fetch_id:
                for name, stored in landing.object_names.items():
                    self._disk.use(name, landing.needed_ranges(stored.key))

    def _reserve(self, request: FetchRequest) -> None:
        """Make what is only cached give way to a replica."""
        with self._lock:
            reserved_bytes = max(request.reserved_bytes, request.plan.total_bytes)
            self._reserved[request.plan.fetch_id] = reserved_bytes
            self._tier.limit_cache(self._cache_bytes())

    def _unreserve(self, fetch_id: str) -> None:
        with self._lock:
            self._reserved.pop(fetch_id, None)
            self._tier.limit_cache(self._cache_bytes())

    def _cache_bytes(self) -> int:
        left_bytes = self._limits.memory_bytes - sum(self._reserved.values())
        return max(min(self._limits.tier_bytes, left_bytes), 0)

    def _ids(self) -> list[str]:
        in_tier = {landing.plan.fetch_id for landing in self._tier.fetches()}
        return sorted(in_tier | self._running.keys())
