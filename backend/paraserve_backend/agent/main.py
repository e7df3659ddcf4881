"""The agent process: builds its components, runs them, and removes what it made when it ends.

Models and keys that an earlier agent left behind are removed at the start; cached weights stay.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from paraserve_backend.agent.config import AgentConfig
from paraserve_backend.agent.disk_upkeep import DiskUpkeep, Upkeep
from paraserve_backend.agent.fetches import Fetches, FetchLimits
from paraserve_backend.agent.hardware import devices_of, node_info, usable_bytes
from paraserve_backend.agent.parts.models import NodeContext
from paraserve_backend.agent.parts.registry import Parts
from paraserve_backend.agent.peer_server import PeerServer, RateLimit
from paraserve_backend.agent.registration import GrpcSchedulerPort, Registration
from paraserve_backend.agent.run_files import RunFiles
from paraserve_backend.agent.service import AgentService
from paraserve_backend.agent.slots import SlotLimits, Slots
from paraserve_backend.agent.watchdog import Watchdog, WatchLimits
from paraserve_backend.channel.keys import KeyStore
from paraserve_backend.daemon.private_files import own_folder
from paraserve_backend.daemon.process import run_daemon
from paraserve_backend.daemon.settings import read_token
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.run_dir import RUN_DIR_ENTRIES, RunDir
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.addresses import split_address, with_port
from paraserve_backend.rpc.auth import require_loopback
from paraserve_backend.rpc.channels import cluster_server, listen
from paraserve_backend.rpc.paraserve_pb2_grpc import add_AgentServicer_to_server
from paraserve_backend.tritonserver.host.client import TritonClient, read_key
from paraserve_backend.tritonserver.host.repository import ModelRepository
from paraserve_backend.tritonserver.host.stubs import ProcessTable
from paraserve_backend.tritonserver.host.unloader import Unloader
from paraserve_backend.weights.sources.open import Sources
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.layout import OBJECTS
from paraserve_backend.weights.tiers.memory import Tier

logger = logging.getLogger(__name__)


async def run(config: AgentConfig) -> None:
    """Serve until cancelled; then remove all parts, fetches and keys from the node.

    Weights that may stay cached are left for the next agent.

    Raises:
        InvalidRequest: a setting is wrong, the address is taken, or it would be open to everybody.
        AlreadyExists: another agent uses the same run_dir or disk_dir.
    """
    token = read_token(config.token_file, os.environ)
    require_loopback(config.listen, token)
    async with AsyncExitStack() as stack:
        triton = TritonClient(config.triton, key=read_key(config.triton_key_file))
        stack.push_async_callback(triton.close)
        own_folder(config.run_dir, entries=RUN_DIR_ENTRIES)
        tier = Tier.open(RunDir(config.run_dir).tier.path, cache_bytes=sys.maxsize)
        config = _with_memory(config, tier)
        tier.limit_cache(config.tier_bytes or 0)
        disk = _open_disk(config)
        if disk is not None:
            stack.callback(disk.close)
        agent = _Agent.make(config, triton, tier, disk, token)
        stack.push_async_callback(agent.stop)
        if agent.peers is not None:
            # Before the tier is given back.
            stack.callback(agent.peers.stop)
        server = cluster_server(token)
        port = listen(server, config.listen)
        stack.push_async_callback(server.stop, grace=None)
        scheduler = GrpcSchedulerPort(config.scheduler, token)
        stack.push_async_callback(scheduler.close)
        await agent.remove_leftovers()
        add_AgentServicer_to_server(agent.service(), server)
        await server.start()
        info = node_info(config, port, proc=Path("/proc"), dev=Path("/dev"))
        if agent.peers is not None:
            info.peer_address = config.advertise_peers or _peer_address(info, agent.peers)
            agent.peers.start(info.peer_address)
        await agent.serve(Registration(scheduler, info, agent.status, agent.changed))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Agent:
    """The pieces of one running agent."""

    config: AgentConfig
    node: NodeContext
    parts: Parts
    watchdog: Watchdog
    changed: asyncio.Event
    #: None: other agents read nothing here.
    peers: PeerServer | None
    #: None: nothing is kept on disk.
    upkeep: Upkeep | None

    @classmethod
    def make(
        cls,
        config: AgentConfig,
        triton: TritonClient,
        tier: Tier,
        disk: DiskTier | None,
        token: str | None,
    ) -> _Agent:
        stubs = ProcessTable(config.model_repository)
        changed = asyncio.Event()
        repository = ModelRepository(config.model_repository)
        unloader = Unloader(triton=triton, stubs=stubs)
        run_files = RunFiles(RunDir(config.run_dir))
        slots = Slots(
            repository,
            unloader,
            run_files,
            _slot_limits(config),
            changed=changed.set,
            now_s=time.monotonic,
        )
        node = NodeContext(
            run_dir=RunDir(config.run_dir),
            repository=repository,
            unloader=unloader,
            fetches=Fetches(
                tier,
                _fetch_limits(config),
                token=token,
                disk=disk,
                sources=Sources(principal=config.store_principal, roots=config.source_roots),
            ),
            keys=KeyStore(RunDir(config.run_dir)),
            run_files=run_files,
            slots=slots,
            part_deadline_s=config.part_deadline_s,
            remove_deadline_s=config.remove_deadline_s,
            now=time.time,
        )
        parts = Parts(node, changed, failure_kept_s=config.failure_kept_s)
        watchdog = Watchdog(
            triton=triton,
            stubs=stubs,
            run_files=run_files,
            parts=parts,
            slots=slots,
            changed=changed,
            limits=WatchLimits(interval_s=config.watch_interval_s, silence_s=config.silence_s),
        )
        return cls(
            config=config,
            node=node,
            parts=parts,
            watchdog=watchdog,
            changed=changed,
            peers=_peer_server(config, tier, token),
            upkeep=_upkeep(tier, disk, node.fetches),
        )

    async def serve(self, registration: Registration) -> None:
        """Run until cancelled; ends with the first of its tasks that fails."""
        logger.info("agent started name=%s", self.config.name)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.watchdog.run())
            group.create_task(self.node.slots.run())
            group.create_task(self.node.fetches.prepare())
            group.create_task(registration.run())
            if self.upkeep is not None:
                group.create_task(self.upkeep.run())

    def service(self) -> AgentService:
        return AgentService(self.parts, self.node.slots, self.status)

    async def status(self) -> pb.NodeStatus:
        tier, used_bytes = await self.node.fetches.contents()
        return pb.NodeStatus(
            name=self.config.name,
            triton_live=self.watchdog.triton_live,
            parts=self.parts.statuses(),
            tier=tier,
            tier_used_bytes=used_bytes,
            disk_used_bytes=self.node.fetches.disk_used_bytes,
            idle_slots=self.node.slots.idle_sets,
            slots_bytes=await self.node.slots.idle_bytes(),
        )

    async def remove_leftovers(self) -> None:
        """Take away what an agent left that did not stop cleanly."""
        models = self.node.repository.ours()
        if models:
            logger.info("leftovers models=%s", ",".join(models))
            await self.node.unloader.unload([models], self.config.remove_deadline_s)
        for model in models:
            self.node.repository.remove(model)
        self.node.repository.remove_unfinished()
        self._forget_secrets()
        await self.node.fetches.release_all()

    def _forget_secrets(self) -> None:
        self.node.keys.clear()
        self.node.run_files.clear()

    async def stop(self) -> None:
        await self.parts.remove_all()
        await self.node.slots.remove_all()
        await self.node.fetches.close()
        tier_dir = RunDir(self.config.run_dir).tier.path
        if not any((tier_dir / OBJECTS).iterdir()):  # else the next agent may use what is there
            # Only what is ours: somebody may have set run_dir to a folder that holds more.
            shutil.rmtree(tier_dir)
        self._forget_secrets()
        with suppress(OSError):
            self.config.run_dir.rmdir()
        logger.info("agent stopped name=%s", self.config.name)


def _with_memory(config: AgentConfig, tier: Tier) -> AgentConfig:
    """Fill in what depends on the machine's memory."""
    memory_bytes = config.memory_bytes
    if memory_bytes is None:
        memory_bytes = usable_bytes(Path("/proc"), tier.used_bytes)
    tier_bytes = memory_bytes // 2 if config.tier_bytes is None else config.tier_bytes
    return replace(config, memory_bytes=memory_bytes, tier_bytes=tier_bytes)


def _slot_limits(config: AgentConfig) -> SlotLimits:
    return SlotLimits(
        run_dir=str(config.run_dir),
        devices=devices_of(config, Path("/dev")),
        most_idle_sets=config.max_slots,
    )


def _open_disk(config: AgentConfig) -> DiskTier | None:
    if config.disk_dir is None or config.disk_bytes == 0:
        return None
    try:
        return DiskTier.open(config.disk_dir, disk_bytes=config.disk_bytes)
    except OSError as error:
        raise InvalidRequest(
            f"Cannot keep weights in disk_dir {config.disk_dir}: {error.strerror}."
        ) from None


def _upkeep(tier: Tier, disk: DiskTier | None, fetches: Fetches) -> Upkeep | None:
    if disk is None:
        return None
    return Upkeep(DiskUpkeep(tier, disk), lambda: fetches.is_fetching)


def _fetch_limits(config: AgentConfig) -> FetchLimits:
    return FetchLimits(
        threads=config.fetch_threads,
        tier_bytes=config.tier_bytes or 0,
        memory_bytes=config.memory_bytes or 0,
        link_bytes_per_s=config.nic_bytes_per_s,
    )


def _peer_server(config: AgentConfig, tier: Tier, token: str | None) -> PeerServer | None:
    if config.peer_rate_bytes_per_s == 0:
        return None
    address = config.peer_listen or with_port(config.listen, 0)
    require_loopback(address, token)
    host, port = split_address(address)
    return PeerServer(
        tier,
        host=host,
        port=port,
        token=token,
        rate=RateLimit(config.peer_rate_bytes_per_s),
        most_connections=config.peer_connections,
    )


def _peer_address(info: pb.NodeInfo, peers: PeerServer) -> str:
    """Where others reach `peers`: on the host on which they reach the agent."""
    return with_port(info.agent_address, peers.port)


def main(argv: Sequence[str]) -> int:
    """Run the agent until SIGTERM or SIGINT.

    Raises:
        ParaServeError: see `run`.
    """
    return run_daemon(AgentConfig, run, argv, program="paraserve agent")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
