"""Builds a node of fakes with a real tier, repository and key store in a folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from paraserve_backend.agent.fetches import Fetches, FetchLimits, FetchRequest
from paraserve_backend.agent.parts.models import NodeContext
from paraserve_backend.agent.parts.registry import Parts
from paraserve_backend.agent.slots import SlotLimits, Slots
from paraserve_backend.channel.keys import KeyStore
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.tritonserver.host.repository import ModelRepository
from paraserve_backend.tritonserver.host.unloader import Unloader
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan, plan_fetch
from paraserve_backend.weights.checkpoint.index import read_index
from paraserve_backend.weights.sources.open import open_source
from paraserve_backend.weights.tiers.memory import Tier
from tests.support.agent_fakes import FakeProcesses, FakeTriton
from tests.support.checkpoints import write_checkpoint


@dataclass(slots=True, kw_only=True)
class FakeNode:
    folder: Path
    triton: FakeTriton
    processes: FakeProcesses
    fetches: Fetches
    slots: Slots
    parts: Parts
    changed: asyncio.Event
    #: Seconds since the Unix epoch; a test sets it forward.
    now_s: list[float] = field(default_factory=lambda: [1000.0])

    def observe(self, *, triton_live: bool = True) -> None:
        self.parts.observe(self.processes.find(), triton_live=triton_live)
        self.slots.observe(self.processes.find())

    def models_on_disk(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "models").iterdir())

    async def assert_nothing_left(self) -> None:
        assert self.models_on_disk() == []
        assert self.processes.find() == ()
        assert list(RunDir(self.folder).keys.glob("*")) == []
        assert await self.fetches.contents() == ([], 0)


@asynccontextmanager
async def fake_node(
    folder: Path, *, part_deadline_s: float = 30, remove_deadline_s: float = 30
) -> AsyncIterator[FakeNode]:
    (folder / "models").mkdir()
    processes, now_s, changed = FakeProcesses(), [1000.0], asyncio.Event()
    triton = FakeTriton(folder / "models", processes)
    fetches = Fetches(Tier.open(RunDir(folder).tier.path), FetchLimits(threads=1))
    repository = ModelRepository(folder / "models")
    unloader = Unloader(triton=triton, stubs=processes, kill_s=0.2)
    slots = Slots(
        repository,
        unloader,
        SlotLimits(run_dir=str(folder), devices=("cpu",), most_idle_sets=2),
        changed=changed.set,
        now_s=lambda: now_s[0],
    )
    node = NodeContext(
        repository=repository,
        unloader=unloader,
        fetches=fetches,
        keys=KeyStore(RunDir(folder)),
        slots=slots,
        part_deadline_s=part_deadline_s,
        remove_deadline_s=remove_deadline_s,
        now=lambda: now_s[0],
    )
    parts = Parts(node, changed, failure_kept_s=300)
    yield FakeNode(
        folder=folder,
        triton=triton,
        processes=processes,
        fetches=fetches,
        slots=slots,
        parts=parts,
        changed=changed,
        now_s=now_s,
    )
    await parts.remove_all()
    await slots.remove_all()
    await fetches.close()


def make_plan(folder: Path, fetch_id: str = "tiny.1.0") -> FetchPlan:
    index = read_index(open_source(str(write_checkpoint(folder))))
    return plan_fetch(index, list(index.tensors.values()), fetch_id=fetch_id)


def make_request(plan: FetchPlan) -> FetchRequest:
    return FetchRequest(plan=plan, endpoint_url=None, region=None)


def make_part(
    *names: str, plan: FetchPlan | None = None, replica: str = "tiny.1", keys: bool = False
) -> pb.Part:
    """Return a part whose models load in the order given, each in a wave of its own."""
    models = [
        pb.ModelFiles(name=name, files={"config.pbtxt": b"", "1/none": b""}, load_wave=wave)
        for wave, name in enumerate(names or [replica])
    ]
    part = pb.Part(replica=replica, models=models)
    if plan is not None:
        part.fetch.CopyFrom(pb.Fetch(plan_json=plan.to_json()))
    if keys:
        part.channel_keys.CopyFrom(pb.ChannelKeys(public_key="public", secret_key="secret"))
    return part


async def follow(node: FakeNode, part: pb.Part) -> list[pb.PartStatus]:
    """Apply a part and return every status that it reports."""
    progress = await node.parts.apply(part)
    return [status async for status in progress.follow()]


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until something holds; the test's own time limit bounds it."""
    while not condition():
        await asyncio.sleep(0)
