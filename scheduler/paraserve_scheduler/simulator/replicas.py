"""A simulated replica from start to end: processes, fetches, loading, growth.

It knows no policy: it does what a start decision says, with the constants of its nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from paraserve_backend.protocol.names import ReplicaModels
from paraserve_backend.telemetry.spans import Span, SpanName
from paraserve_scheduler.planner.cost import ModelShape, runtime_s
from paraserve_scheduler.planner.decisions import StageChoice, StageSource, Start
from paraserve_scheduler.planner.fleet import ReplicaPhase
from paraserve_scheduler.simulator.clock import Heap
from paraserve_scheduler.simulator.description import DeploymentDescription
from paraserve_scheduler.simulator.memory import NodeMemory
from paraserve_scheduler.simulator.network import (
    DISK,
    INTO,
    OUT_OF,
    STORE,
    Network,
    Transfer,
)
from paraserve_scheduler.simulator.serving import Batch
from paraserve_scheduler.simulator.trace import Trace


class Surroundings(Protocol):
    """What replicas share."""

    heap: Heap
    network: Network
    nodes: dict[str, NodeMemory]
    trace: Trace


@dataclass(slots=True, eq=False, kw_only=True)
class SimReplica:
    name: str
    deployment: DeploymentDescription
    start: Start
    #: Those it holds now; the first is the head.
    stages: list[StageChoice]
    started_s: float
    phase: ReplicaPhase = ReplicaPhase.STARTING
    is_gone: bool = False
    is_growing: bool = False
    ready_s: float | None = None
    idle_since_s: float | None = None
    transfers: list[Transfer] = field(default_factory=list)
    #: Set once it serves.
    batch: Batch | None = None

    @property
    def model(self) -> ModelShape:
        return self.deployment.model

    @property
    def full(self) -> int:
        """Stages that have the memory of a full worker, and so its speed."""
        whole = self.model.full_bytes
        return max(1, sum(stage.reserved_bytes >= whole for stage in self.stages))

    @property
    def capacity(self) -> int:
        return self.deployment.max_sequences * len(self.stages)

    @property
    def in_flight(self) -> int:
        return self.batch.running if self.batch else 0


def begin(replica: SimReplica, around: Surroundings, ready: Callable[[SimReplica], None]) -> None:
    """Start all stages now; `ready` is called when the last can serve."""
    waiting = len(replica.stages)

    def stage_done() -> None:
        nonlocal waiting
        waiting -= 1
        if waiting == 0 and not replica.is_gone:
            ready(replica)

    for stage in replica.stages:
        has_slot = stage.uses_slot and _gpu_slot(around.nodes[stage.node], stage.gpu)
        _begin_stage(replica, stage, around, has_slot, stage_done)


def _gpu_slot(node: NodeMemory, gpu: int) -> bool:
    node.version += 1
    return node.gpus[gpu].take_slot()


def _begin_stage(
    replica: SimReplica,
    stage: StageChoice,
    around: Surroundings,
    has_slot: bool,
    done: Callable[[], None],
) -> None:
    method = around.nodes[stage.node].description.kind.start
    if method.is_instant:
        around.heap.after(0.0, done)
        return
    heap, began_s = around.heap, around.heap.now_s
    process_s = runtime_s(method, has_slot=has_slot)
    size = replica.model.bytes_of(stage.start, stage.end)
    setup_s = method.pipeline_setup_s if len(replica.stages) > 1 else 0.0
    fetching_s = began_s if method.is_overlapped else began_s + process_s

    def loaded() -> None:
        if not replica.is_gone:
            _trace_stage(replica, stage, around, began_s, began_s + process_s, has_slot=has_slot)
            done()

    def arrived() -> None:
        if not replica.is_gone:
            fetched = Span(
                name=SpanName.FETCH, start_s=fetching_s, end_s=heap.now_s, size_bytes=size
            )
            _trace(replica, stage, around, fetched)
            after_s = max(heap.now_s, began_s + process_s)
            heap.at(after_s + method.tail_s + size * method.load_s_per_byte + setup_s, loaded)

    layers = [(stage.start, stage.end)]
    fetch = _Fetch(replica, stage.node, layers, around, arrived, stage.sources)
    if method.is_overlapped:
        fetch.begin(rank=0, deadline_s=replica.start.deadline_s)
    else:
        heap.after(process_s, fetch.begin)


def _trace_stage(
    replica: SimReplica,
    stage: StageChoice,
    around: Surroundings,
    began_s: float,
    running_s: float,
    *,
    has_slot: bool,
) -> None:
    """Write down a stage that is ready now, whose process was there at `running_s`."""
    name, now_s = SpanName.BIND if has_slot else SpanName.LOAD, around.heap.now_s
    torch = Span(name=SpanName.IMPORT_TORCH, start_s=began_s, end_s=running_s)
    adopt = Span(name=SpanName.ADOPT_WEIGHTS, start_s=running_s, end_s=now_s)
    model = Span(name=name, detail=_model(replica, stage), start_s=began_s, end_s=now_s)
    for span in (adopt, model) if has_slot else (torch, adopt, model):
        _trace(replica, stage, around, span)
    around.trace.instant(
        SpanName.READY,
        now_s,
        detail=f"[{stage.start}, {stage.end})",
        replica=replica.name,
        node=stage.node,
        gpu=stage.gpu,
    )


def _model(replica: SimReplica, stage: StageChoice) -> str:
    models, stages = ReplicaModels(replica.name), replica.start.stages
    is_whole = len(stages) == 1
    return models.short(models.generate if is_whole else models.stage(stages.index(stage)))


def _trace(replica: SimReplica, stage: StageChoice, around: Surroundings, span: Span) -> None:
    around.trace.interval(span, replica=replica.name, node=stage.node, gpu=stage.gpu)


class _Fetch:
    """Layers that one stage lacks in host memory, from disk, peers and the store at once."""

    def __init__(
        self,
        replica: SimReplica,
        node: str,
        layers: Sequence[tuple[int, int]],
        around: Surroundings,
        done: Callable[[], None],
        sources: Sequence[StageSource] = (),
    ) -> None:
        self._replica = replica
        self._sources = sources
        self._running = 0
        self._node = around.nodes[node]
        self._layers = layers
        self._around = around
        self._done = done

    def begin(self, rank: int = 0, deadline_s: float | None = None) -> None:
        if self._replica.is_gone:
            return
        shares = self._shares()
        self._node.used(self._replica.deployment.name)
        if not shares:
            self._done()
            return
        self._node.version += 1
        self._running = len(shares)
        for links, size in shares.items():
            transfer = self._around.network.begin(
                size,
                node=self._node.description.name,
                links=links,
                done=self._source_done,
                rank=rank,
                deadline_s=deadline_s,
            )
            self._replica.transfers.append(transfer)

    def _source_done(self) -> None:
        self._running -= 1
        if self._running == 0:
            self._arrived()

    def _shares(self) -> dict[tuple[Hashable, ...], int]:
        """Bytes to move over which links: as planned, or all from the store if it is not so now."""
        name = self._node.description.name
        lacking = self._lacking_bytes()
        planned = [
            source
            for source in self._sources
            if source.size_bytes and (source.peer != name or source.is_on_disk)
        ]
        if sum(source.size_bytes for source in planned) != lacking:
            return {((INTO, name), STORE): lacking} if lacking else {}
        return {self._links(source): source.size_bytes for source in planned}

    def _links(self, source: StageSource) -> tuple[Hashable, ...]:
        name = self._node.description.name
        if source.is_on_disk:
            return ((DISK, name),)
        return ((INTO, name), STORE if source.peer is None else (OUT_OF, source.peer))

    def _lacking_bytes(self) -> int:
        model = self._replica.model
        cached = self._node.memory.layers(self._replica.deployment.name)
        size = 0
        for start, end in self._layers:
            size += model.bytes_of(start, end)
            for low, high in cached:
                if low < end and start < high:
                    size -= model.bytes_of(max(low, start), min(high, end))
        return size

    def _arrived(self) -> None:
        self._node.version += 1
        if self._replica.start.keeps_in_memory and not self._node.is_lost:
            for start, end in self._layers:
                self._node.keep(self._replica.deployment.name, start, end, self._replica.model)
        self._done()


def grow(replica: SimReplica, around: Surroundings, grown: Callable[[SimReplica], None]) -> None:
    """Have every growing stage take in what it lacks; `grown` is called when all have."""
    growing = [stage for stage in replica.stages if stage.grows]
    replica.is_growing = True
    waiting = len(growing)

    def stage_done() -> None:
        nonlocal waiting
        waiting -= 1
        if waiting == 0 and not replica.is_gone:
            replica.is_growing = False
            grown(replica)

    for stage in growing:
        _grow_stage(replica, stage, around, stage_done)


def _grow_stage(
    replica: SimReplica, stage: StageChoice, around: Surroundings, done: Callable[[], None]
) -> None:
    model, growth, heap = replica.model, replica.start.growth, around.heap
    method = around.nodes[stage.node].description.kind.start
    layers = [(0, stage.start), (stage.end, model.num_layers)]
    size = model.total_bytes - model.bytes_of(stage.start, stage.end)
    began_s = heap.now_s

    def arrived() -> None:
        grown = Span(name=SpanName.GROW, start_s=began_s, end_s=heap.now_s, size_bytes=size)
        _trace(replica, stage, around, grown)
        heap.after(0.0 if method.is_instant else size * method.load_s_per_byte, done)

    deadline_s = None
    if growth.deadline_after_s is not None:
        deadline_s = began_s + growth.deadline_after_s
    fetch = _Fetch(replica, stage.node, layers, around, arrived)
    if method.is_instant:
        heap.after(0.0, done)
    else:
        fetch.begin(rank=-1 if growth.is_background else 0, deadline_s=deadline_s)
