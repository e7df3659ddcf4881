"""A node of fakes with a real tier, repository and key store in a folder, and parts for it.

Its Triton and its process table are in memory; they behave like the real ones as far as the agent
sees.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from paraserve_backend.agent.fetches import Fetches, FetchLimits, FetchRequest
from paraserve_backend.agent.parts.models import NodeContext
from paraserve_backend.agent.parts.registry import Parts
from paraserve_backend.agent.run_files import RunFiles
from paraserve_backend.agent.slots import SlotLimits, Slots
from paraserve_backend.channel.keys import KeyStore
from paraserve_backend.errors import InvalidRequest, ParaServeError, Unavailable
from paraserve_backend.protocol.names import ReplicaModels
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.tritonserver.host.client import ModelState
from paraserve_backend.tritonserver.host.repository import ModelRepository
from paraserve_backend.tritonserver.host.stubs import Stub
from paraserve_backend.tritonserver.host.unloader import Unloader
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan, plan_fetch
from paraserve_backend.weights.checkpoint.index import read_index
from paraserve_backend.weights.sources.open import open_source
from paraserve_backend.weights.tiers.memory import Tier
from tests.support.checkpoints import write_checkpoint
from tests.support.limits import HANG_S


@dataclass(slots=True, kw_only=True)
class AgentHarness:
    folder: Path
    triton: FakeTritonClient
    processes: FakeProcesses
    fetches: Fetches
    run_files: RunFiles
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
        run_dir = RunDir(self.folder)
        for folder in (run_dir.keys, run_dir.secrets, run_dir.pulses, run_dir.loaded):
            assert list(folder.glob("*")) == []
        assert await self.fetches.contents() == ([], 0)


@asynccontextmanager
async def agent_harness(
    folder: Path,
    *,
    part_deadline_s: float = HANG_S,
    remove_deadline_s: float = HANG_S,
    kill_s: float = HANG_S,
) -> AsyncIterator[AgentHarness]:
    (folder / "models").mkdir()
    processes, now_s, changed = FakeProcesses(), [1000.0], asyncio.Event()
    triton = FakeTritonClient(folder / "models", processes)
    fetches = Fetches(Tier.open(RunDir(folder).tier.path), FetchLimits(threads=1))
    repository = ModelRepository(folder / "models")
    unloader = Unloader(triton=triton, stubs=processes, kill_s=kill_s)
    run_files = RunFiles(RunDir(folder))
    slots = Slots(
        repository,
        unloader,
        run_files,
        SlotLimits(run_dir=str(folder), devices=("cpu",), most_idle_sets=2),
        changed=changed.set,
        now_s=lambda: now_s[0],
    )
    node = NodeContext(
        run_dir=RunDir(folder),
        repository=repository,
        unloader=unloader,
        fetches=fetches,
        keys=KeyStore(RunDir(folder)),
        run_files=run_files,
        slots=slots,
        part_deadline_s=part_deadline_s,
        remove_deadline_s=remove_deadline_s,
        now=lambda: now_s[0],
    )
    parts = Parts(node, changed, failure_kept_s=300)
    yield AgentHarness(
        folder=folder,
        triton=triton,
        processes=processes,
        fetches=fetches,
        run_files=run_files,
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


async def follow(node: AgentHarness, part: pb.Part) -> list[pb.PartStatus]:
    """Apply a part and return every status that it reports."""
    progress = await node.parts.apply(part)
    return [status async for status in progress.follow()]


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until something holds; pytest ends a test in which it never does."""
    while not condition():
        await asyncio.sleep(0)


# ---- what the agent calls ----


class FakeProcesses:
    """`Stubs` whose processes a `FakeTritonClient` starts and ends."""

    def __init__(self) -> None:
        self.alive: dict[int, Stub] = {}
        self.killed: list[str] = []
        self.cleaned: list[str] = []
        self.unkillable = False
        #: Models whose processes a signal has stopped, and whether Triton's own is.
        self.stopped_models: set[str] = set()
        self.is_server_stopped = False
        self._pids = count(100)

    def start(self, model: str) -> None:
        pid = next(self._pids)
        self.alive[pid] = Stub(pid=pid, model=model, shm_region=Path(f"/shm/{pid}"))

    def end(self, model: str) -> None:
        self.alive = {pid: stub for pid, stub in self.alive.items() if stub.model != model}

    def find(self) -> tuple[Stub, ...]:
        return tuple(self.alive.values())

    def stopped(self, found: Iterable[Stub]) -> frozenset[Stub]:
        return frozenset(stub for stub in found if stub.model in self.stopped_models)

    def server_stopped(self, _found: Iterable[Stub]) -> bool:
        return self.is_server_stopped

    def kill(self, stub: Stub) -> None:
        self.killed.append(stub.model)
        if not self.unkillable:
            self.alive.pop(stub.pid, None)

    def private_bytes(self, _stub: Stub) -> int:
        return 1000

    def remove_leftovers(self, stubs: Iterable[Stub]) -> None:
        self.cleaned += [stub.model for stub in stubs]


class FakeTritonClient:
    """`Triton` over a repository folder: loads what lies there, one process per model.

    An unload waits for a load of the same model and answers while the model is UNLOADING; it is
    gone a little later, or never if it is in `hung`.
    """

    def __init__(self, repository: Path, processes: FakeProcesses) -> None:
        self.processes = processes
        self.is_up = True
        #: It takes questions whether it is live and does not answer them.
        self.is_silent = False
        #: Loads of these models, and commands to them, wait until their event is set.
        self.gates: dict[str, asyncio.Event] = {}
        self.load_errors: dict[str, ParaServeError] = {}
        #: Models whose load answers with this error although it goes on.
        self.late: dict[str, ParaServeError] = {}
        self.hung: set[str] = set()
        self.loads: list[str] = []
        self.unloads: list[str] = []
        #: (model, command) as they came, and the secrets that came with them.
        self.commands: list[tuple[str, str]] = []
        self.secrets: list[tuple[str, str]] = []
        #: What the next command is answered with instead.
        self.command_error: ParaServeError | None = None
        self._repository = repository
        self._states: dict[str, ModelState] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def live(self) -> bool | None:
        return None if self.is_silent else self.is_up

    async def load(self, model: str) -> None:
        self._require_up()
        self.loads.append(model)
        # A caller that gives up does not end a load.
        loading = asyncio.ensure_future(self._load(model))
        if model in self.late:
            await asyncio.sleep(0)  # the load is under way
            raise self.late[model]
        await asyncio.shield(loading)

    async def unload(self, model: str) -> None:
        self._require_up()
        self.unloads.append(model)
        async with self._lock(model):
            if self._states.get(model) is ModelState.READY:
                self._states[model] = ModelState.UNLOADING
                asyncio.get_running_loop().call_soon(self._finish_unload, model)

    async def states(self) -> dict[str, ModelState]:
        self._require_up()
        return dict(self._states)

    async def command(
        self,
        model: str,
        command: str,
        *,
        secret: str,
        replica: str = "",
        timeout_s: float | None = HANG_S,
    ) -> None:
        self._require_up()
        self.commands.append((model, command))
        self.secrets.append((model, secret))
        async with asyncio.timeout(timeout_s):
            if model in self.gates:
                await self.gates[model].wait()
        if self.command_error is not None:
            raise self.command_error

    def _finish_unload(self, model: str) -> None:
        if model not in self.hung:
            self._states[model] = ModelState.UNAVAILABLE
            self.processes.end(model)

    async def _load(self, model: str) -> None:
        if not (self._repository / model).is_dir():
            raise InvalidRequest(f"failed to poll {model} from model repository")
        async with self._lock(model):
            if self._states.get(model) is ModelState.READY:
                return
            self._states[model] = ModelState.LOADING
            if model in self.gates:
                await self.gates[model].wait()
            self._finish_load(model)

    def _finish_load(self, model: str) -> None:
        error = self.load_errors.get(model)
        if error is not None:
            self._states[model] = ModelState.UNAVAILABLE
            raise error
        self._states[model] = ModelState.READY
        self.processes.start(model)

    def _require_up(self) -> None:
        if not self.is_up:
            raise Unavailable("Triton does not answer.")

    def _lock(self, model: str) -> asyncio.Lock:
        return self._locks.setdefault(model, asyncio.Lock())


# ---- parts whose models fit into slots ----


def model_files(role: str, *, backend: str = "paraserve", **parameters: str) -> dict[str, bytes]:
    lines = [f'backend: "{backend}"']
    lines += [
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
        for key, value in {"role": role, **parameters}.items()
    ]
    return {"config.pbtxt": "\n".join(lines).encode(), "1/.keep": b""}


def ensemble_files(*steps: str) -> dict[str, bytes]:
    text = "".join(
        f'step {{ model_name: "{step}" input_map {{ key: "x" value: "y" }} }}' for step in steps
    )
    config = f'platform: "ensemble" ensemble_scheduling {{ {text} }}'
    return {"config.pbtxt": config.encode(), "1/.keep": b""}


def head_part(replica: str = "tiny.1") -> pb.Part:
    """What the head of a pipeline gets: front, stage and link, and the ensemble of the latter."""
    names = ReplicaModels(replica)
    stage, link = names.stage(0), names.link
    models = {
        names.generate: model_files("generate", replica=replica),
        stage: model_files("stage", replica=replica),
        link: model_files("link", replica=replica),
        names.forward: ensemble_files(stage, link),
    }
    return pb.Part(
        replica=replica,
        models=[
            pb.ModelFiles(name=name, files=files, load_wave=int(name == names.forward))
            for name, files in models.items()
        ],
    )
