"""All parts on this node, by replica and stage.

Commands for one replica are carried out one after the other. Failed parts are forgotten here after
some time.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Set
from weakref import WeakValueDictionary

from paraserve_backend.agent.parts.life import PartLife
from paraserve_backend.agent.parts.models import NodeContext
from paraserve_backend.agent.parts.progress import PartProgress
from paraserve_backend.errors import InvalidRequest, NotFound, Unavailable
from paraserve_backend.protocol.names import ReplicaModels, replica_of
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.tritonserver.host.model_config import own_parameters
from paraserve_backend.tritonserver.host.repository import check_name
from paraserve_backend.tritonserver.host.stubs import Stub

logger = logging.getLogger(__name__)


class Parts:
    """The node's parts by replica and stage. `changed` is set whenever one changes its phase."""

    def __init__(self, node: NodeContext, changed: asyncio.Event, *, failure_kept_s: float) -> None:
        self._node = node
        self._changed = changed
        self._failure_kept_s = failure_kept_s
        self._lives: dict[tuple[str, int], PartLife] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._removals: set[asyncio.Task[bool]] = set()

    async def apply(self, part: pb.Part) -> PartProgress:
        """Start a part, or attach to the one that is there, even if that has failed.

        Raises:
            InvalidRequest: a name in it is not allowed.
        """
        _check(part, self._node.run_dir)
        async with self._lock(part.replica):
            key = (part.replica, part.stage)
            life = self._lives.get(key)
            if life is None:
                logger.info("apply replica=%s stage=%d", part.replica, part.stage)
                life = self._lives[key] = PartLife(part, self._node, self._changed.set)
                life.start()
            return life.progress

    async def remove(self, replica: str, deadline_s: float = 0) -> bool:
        """Remove a replica's parts; returns whether there were any, when their memory is free.

        `deadline_s` 0 is the node's default; after it processes are killed. Goes on when the
        caller is cancelled. A part that is loading is unloaded after its load has ended.

        Raises:
            DeadlineExceeded: a process survived; nothing is forgotten, try again.
        """
        task = asyncio.create_task(self._remove(replica, deadline_s))
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)
        return await asyncio.shield(task)

    async def hand_over(self, request: pb.HandOverRequest) -> None:
        """Tell a replica's head which others shall take its running requests.

        Raises:
            NotFound: its head is not on this node.
            Unavailable: it is not ready.
            ParaServeError: it refused.
        """
        life = self._lives.get((request.replica, 0))
        if life is None:
            raise NotFound(f"The head of {request.replica} is not on this node.")
        if life.progress.phase != pb.READY:
            raise Unavailable(f"{request.replica} is not ready on this node.")
        targets = [
            {"replica": target.replica, "address": target.address} for target in request.targets
        ]
        logger.info("hand over replica=%s targets=%d", request.replica, len(targets))
        name = ReplicaModels(request.replica).generate
        model = life.slots.get(name, name)
        await self._node.unloader.triton.command(
            model,
            json.dumps({"hand_over": targets}),
            secret=self._node.run_files.secret(model),
            replica=request.replica,
        )

    async def remove_all(self) -> None:
        """Remove everything as far as that goes; what does not go is logged."""
        replicas = sorted({replica for replica, _ in self._lives})
        removals = (self.remove(replica) for replica in replicas)
        results = await asyncio.gather(*removals, return_exceptions=True)
        for replica, result in zip(replicas, results, strict=True):
            if isinstance(result, BaseException):
                logger.error("remove failed replica=%s reason=%s", replica, result)

    def statuses(self) -> list[pb.PartStatus]:
        return [life.progress.snapshot() for life in self._lives.values()]

    @property
    def triton_models(self) -> frozenset[str]:
        """The Triton models that any part has, slots included."""
        return frozenset[str]().union(*(life.triton_models for life in self._lives.values()))

    @property
    def serving_models(self) -> frozenset[str]:
        """Those of parts that are ready."""
        ready = (life for life in self._lives.values() if life.progress.phase == pb.READY)
        return frozenset[str]().union(*(life.triton_models for life in ready))

    @property
    def loading_models(self) -> frozenset[str]:
        """Those that Triton is loading."""
        return frozenset[str]().union(*(life.loading for life in self._lives.values()))

    def observe(
        self, found: Iterable[Stub], *, triton_live: bool, hung: Set[str] = frozenset()
    ) -> None:
        """Tell every part which processes live now; drop failed parts that nobody removed.

        `hung` are Triton models whose processes are there, but do nothing; `found` is without them.
        """
        stubs = tuple(found)
        for life in self._lives.values():
            life.observe(stubs, triton_live=triton_live, hung=hung)
        oldest_s = self._node.now() - self._failure_kept_s
        self._lives = {
            key: life
            for key, life in self._lives.items()
            if not (life.is_over and life.progress.phase_since_s < oldest_s)
        }

    async def _remove(self, replica: str, deadline_s: float) -> bool:
        async with self._lock(replica):
            lives = {key: life for key, life in self._lives.items() if key[0] == replica}
            limit_s = deadline_s or self._node.remove_deadline_s
            await asyncio.gather(*(life.stop(limit_s) for life in lives.values()))
            for key in lives:
                del self._lives[key]
            had_fetches = await self._node.fetches.release_replica(replica)
            logger.info("removed replica=%s parts=%d", replica, len(lives))
            self._changed.set()
            return bool(lives) or had_fetches

    def _lock(self, replica: str) -> asyncio.Lock:
        return self._locks.setdefault(replica, asyncio.Lock())


def _check(part: pb.Part, run_dir: RunDir) -> None:
    check_name(part.replica)
    if not part.models:
        raise InvalidRequest(f"A part of {part.replica} has no models.")
    for model in part.models:
        check_name(model.name)
        # Else two replicas could overwrite each other's models.
        if model.name not in ReplicaModels(part.replica):
            raise InvalidRequest(f"Model {model.name} does not belong to {part.replica}.")
        _check_parameters(model, part.replica, run_dir)


def _check_parameters(model: pb.ModelFiles, replica: str, run_dir: RunDir) -> None:
    """Refuse a model of ours that names what is another replica's: its weights or its keys."""
    parameters = own_parameters(model.files) or {}
    meant = {
        "replica": replica,
        "run_dir": str(run_dir.path),
        "key_file": str(run_dir.key_file(replica)),
    }
    for name, value in meant.items():
        if parameters.get(name, value) != value:
            raise InvalidRequest(f"Model {model.name} names another {name} than {value}.")
    fetch = parameters.get("fetch_id")
    if fetch is not None and replica_of(fetch) != replica:
        raise InvalidRequest(f"Model {model.name} names fetch {fetch}, which is not {replica}'s.")
