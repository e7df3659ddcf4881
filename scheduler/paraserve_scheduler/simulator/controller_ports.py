"""Runs the real controller on the simulated cluster, with simulated clock, agents and gateway.

Only tests use it. Service, speed and the place of bytes are as in `simulator.world`. Slots,
hand-overs and disks are not simulated here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from paraserve_backend.architectures.spec import LayerRange
from paraserve_backend.protocol.names import deployment_of
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan
from paraserve_backend.weights.checkpoint.safetensors import TensorEntry
from paraserve_backend.weights.checkpoint.stages import stage_tensors
from paraserve_scheduler.control_plane.controller.loop import Controller
from paraserve_scheduler.planner.decisions import StageChoice, Start
from paraserve_scheduler.simulator import replicas
from paraserve_scheduler.simulator.clock import Heap
from paraserve_scheduler.simulator.description import DeploymentDescription, NodeDescription
from paraserve_scheduler.simulator.idle_loop import IdleLoop
from paraserve_scheduler.simulator.memory import Meter, NodeMemory
from paraserve_scheduler.simulator.network import Network, capacities
from paraserve_scheduler.simulator.replicas import SimReplica
from paraserve_scheduler.simulator.serving import Batch, pipeline_batch
from paraserve_scheduler.simulator.trace import Trace
from paraserve_scheduler.simulator.workload import SimRequest
from paraserve_scheduler.state.events import DemandReported, NodeRegistered, NodeReported
from paraserve_scheduler.state.records import (
    Demand,
    HeldObject,
    NodeInfo,
    PartState,
    Phase,
    Replica,
)
from paraserve_scheduler.state.spec import Deployment

#: Where virtual time begins, in seconds since the Unix epoch.
EPOCH_S = 1_000.0
#: How often agents and the gateway report.
_REPORT_S = 0.25


class VirtualClock:
    """`Clock` over a heap of events."""

    def __init__(self, heap: Heap) -> None:
        self._heap = heap

    def now_s(self) -> float:
        return EPOCH_S + self._heap.now_s

    async def wait(self, event: asyncio.Event, timeout_s: float) -> float:
        over = asyncio.Event()
        self._heap.after(timeout_s, over.set)
        waits = [asyncio.create_task(each.wait()) for each in (event, over)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One deployment as the controller and as the simulator know it."""

    deployment: Deployment
    description: DeploymentDescription

    def tensors(self, start: int, end: int) -> tuple[TensorEntry, ...]:
        model = self.deployment.model
        layers = LayerRange(start=start, end=end, total=model.num_layers)
        tied = model.tie_word_embeddings
        return stage_tensors(self.deployment.index, model.names, tied=tied, layers=layers)

    def layers_of(self, plan: FetchPlan) -> tuple[int, int]:
        """The layers that a fetch brings."""
        wanted = {tensor.name for tensor in plan.tensors}
        numbers = [
            layer
            for layer in range(self.deployment.model.num_layers)
            if wanted.issuperset(tensor.name for tensor in self.tensors(layer, layer + 1))
        ]
        return numbers[0], numbers[-1] + 1


class SimulatedAgents:
    """`Agents` of nodes that exist only in a simulation; an agent's address is its node's name."""

    def __init__(
        self, heap: Heap, nodes: Sequence[NodeDescription], models: Iterable[Model]
    ) -> None:
        self.heap = heap
        self.trace = Trace()
        self.models = {model.deployment.name: model for model in models}
        meter = Meter(heap)
        self.nodes = {node.name: NodeMemory.of(node, meter) for node in nodes}
        self.network = Network(heap, capacities(nodes, store_bytes_per_s=None))
        #: By node and replica, with the stage's number and the bytes of its weights.
        self._parts: dict[tuple[str, str], _Part] = {}

    def info(self, node: str) -> NodeInfo:
        description = self.nodes[node].description
        return NodeInfo(
            name=node,
            agent_address=node,
            triton_grpc_address=f"{node}:8001",
            memory_bytes=description.gpu_bytes[0],
            nic_bytes_per_s=description.nic_bytes_per_s,
            run_dir=f"/run/{node}",
            channel_host=node,
            channel_ports=(9_000, 10_000),
            devices=("cpu",),
            kind=description.kind.name,
        )

    async def apply(self, address: str, part: pb.Part) -> AsyncIterator[PartState]:
        running = self._begin(address, part)
        yield running.state(self.network)
        await running.ready.wait()
        yield running.state(self.network)

    async def remove(self, address: str, replica: str, deadline_s: float) -> None:
        del deadline_s
        part = self._parts.pop((address, replica), None)
        if part is not None:
            part.life.is_gone = True
            for transfer in part.life.transfers:
                self.network.cancel(transfer)
            (stage,) = part.life.stages
            self.nodes[address].gpus[0].release(stage.reserved_bytes)

    async def hand_over(self, address: str, replica: str, successors: Mapping[str, str]) -> None:
        raise NotImplementedError("replicas here stay as they are")

    async def keep_slots(self, address: str, idle_slots: int) -> None:
        raise NotImplementedError("nodes here have no slots")

    def report(self, node: str, at_s: float) -> NodeReported:
        """The node's heartbeat."""
        self.network.claims()
        parts = [part for (name, _), part in self._parts.items() if name == node]
        return NodeReported(
            node=node,
            triton_live=True,
            parts=tuple(part.state(self.network) for part in parts),
            tier_used_bytes=0,
            tier=tuple(self._tier(node)),
            at_s=at_s,
        )

    def _tier(self, node: str) -> Iterable[HeldObject]:
        for name, layers in self.nodes[node].memory.records().items():
            index = self.models[name].deployment.index
            tensors = [
                tensor for start, end in layers for tensor in self.models[name].tensors(start, end)
            ]
            for stored in index.objects:
                landed = sorted(
                    (tensor.start, tensor.end)
                    for tensor in tensors
                    if tensor.object_key == stored.key
                )
                if landed:
                    yield HeldObject(
                        key=index.store.key_of(index.source_uri, stored.key),
                        version=stored.version,
                        landed_bytes=sum(end - start for start, end in landed),
                        landed=tuple(dict.fromkeys(landed)),
                    )

    def _begin(self, node: str, message: pb.Part) -> _Part:
        model = self.models[message.deployment]
        start, end = model.layers_of(FetchPlan.from_json(message.fetch.plan_json))
        stage = StageChoice(
            node=node, gpu=0, start=start, end=end, reserved_bytes=message.fetch.reserved_bytes
        )
        life = SimReplica(
            name=message.replica,
            deployment=model.description,
            start=Start(
                deployment=message.deployment, stages=(stage,), reason="", keeps_in_memory=True
            ),
            stages=[stage],
            started_s=self.heap.now_s,
        )
        part = _Part(stage=message.stage, life=life)
        self._parts[node, message.replica] = part
        self.nodes[node].gpus[0].reserve(stage.reserved_bytes)
        replicas.begin(life, self, lambda _: part.ready.set())
        return part


@dataclass(slots=True, kw_only=True)
class _Part:
    stage: int
    life: SimReplica
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    def state(self, network: Network) -> PartState:
        (stage,) = self.life.stages
        size = self.life.model.bytes_of(stage.start, stage.end)
        left = sum(network.remaining_bytes(transfer) for transfer in self.life.transfers)
        return PartState(
            replica=self.life.name,
            stage=self.stage,
            phase=Phase.READY if self.ready.is_set() else Phase.STARTING,
            fetched_bytes=size - round(left),
            total_bytes=size,
        )


class SimulatedGateway:
    """Holds requests until the controller has a replica for them; reports every change."""

    def __init__(self, agents: SimulatedAgents, controller: Controller) -> None:
        self._agents = agents
        self._controller = controller
        self._queues: dict[str, deque[SimRequest]] = {name: deque() for name in agents.models}
        self._arrived = dict.fromkeys(agents.models, 0)
        self._batches: dict[str, Batch] = {}

    def arrive(self, request: SimRequest) -> None:
        self._queues[request.deployment].append(request)
        self._arrived[request.deployment] += 1
        self.report()

    def look(self) -> bool:
        """Send what is held to ready replicas that have room; return whether anything was sent."""
        has_sent = False
        for name, queue in self._queues.items():
            for replica in self._controller.view.routed_replicas(name) if queue else ():
                batch = self._batch(replica)
                while queue and batch.running < replica.plan.max_sequences:
                    request = queue.popleft()
                    request.admitted_s = self._agents.heap.now_s
                    batch.add(request)
                    self.report()
                    has_sent = True
        return has_sent

    def report(self) -> None:
        now_s = self._controller.now_s()
        for node in self._agents.nodes:
            self._controller.notify(self._agents.report(node, now_s))
        demands = tuple(self._demand(name) for name in self._queues)
        self._controller.notify(DemandReported(gateway="g", demands=demands, at_s=now_s))

    def _demand(self, name: str) -> Demand:
        running = {
            replica: batch.running
            for replica, batch in self._batches.items()
            if deployment_of(replica) == name and batch.running
        }
        return Demand(
            deployment=name,
            waiting=len(self._queues[name]),
            in_flight=sum(running.values()),
            arrived=self._arrived[name],
            replica_in_flight=running,
        )

    def _batch(self, replica: Replica) -> Batch:
        if replica.id not in self._batches:
            kinds = [
                self._agents.nodes[stage.node].description.kind for stage in replica.plan.stages
            ]
            name = self._agents.models[replica.deployment].description.model.name
            self._batches[replica.id] = pipeline_batch(
                self._agents.heap,
                kinds,
                name,
                full=len(kinds),
                ended=lambda _: self.report(),
            )
        return self._batches[replica.id]


def drive(
    controller: Controller, agents: SimulatedAgents, requests: Iterable[SimRequest], until_s: float
) -> list[Replica]:
    """Run the controller over `requests` until `until_s`; return the replicas it started.

    Time passes only when the controller and the agents have nothing more to do at this time.
    """
    with asyncio.Runner(loop_factory=IdleLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, IdleLoop), "the factory makes it"
        return runner.run(_drive(loop, controller, agents, requests, until_s))


async def _drive(
    loop: IdleLoop,
    controller: Controller,
    agents: SimulatedAgents,
    requests: Iterable[SimRequest],
    until_s: float,
) -> list[Replica]:
    heap, gateway = agents.heap, SimulatedGateway(agents, controller)
    for node in agents.nodes:
        controller.notify(NodeRegistered(info=agents.info(node), at_s=controller.now_s()))
    for request in requests:
        heap.at(request.arrival_s, gateway.arrive, request)

    def report() -> None:
        gateway.report()
        heap.after(_REPORT_S, report)

    report()
    started: dict[str, Replica] = {}
    controlling = asyncio.create_task(controller.run(), name="controller")
    try:
        while heap.now_s < until_s:
            await loop.idle()
            while gateway.look():
                await loop.idle()
            started |= {
                replica.id: replica
                for replica in controller.view.live_replicas()
                if replica.id not in started
            }
            if controlling.done():
                await controlling
            heap.step()
    finally:
        controlling.cancel()
        await asyncio.gather(controlling, return_exceptions=True)
    return list(started.values())
