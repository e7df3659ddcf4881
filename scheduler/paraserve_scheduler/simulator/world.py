"""The simulated cluster that `paraserve simulate` runs: time, requests, memory, network, a policy.

Deterministic: the same description, requests and policy give the same run. It decides nothing: it
asks the policy, which is told what a scheduler would know. The real controller is not part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from paraserve_backend.protocol.names import deployment_of, replica_id
from paraserve_backend.telemetry.spans import SpanName
from paraserve_scheduler.planner.decisions import (
    Decision,
    DropSlot,
    PolicyFunction,
    StageChoice,
    Start,
    Stop,
    WarmSlot,
)
from paraserve_scheduler.planner.fleet import Fleet, ReplicaPhase
from paraserve_scheduler.simulator import replicas
from paraserve_scheduler.simulator.clock import Heap
from paraserve_scheduler.simulator.description import ClusterDescription
from paraserve_scheduler.simulator.memory import Meter, NodeMemory
from paraserve_scheduler.simulator.network import STORE, Network, capacities
from paraserve_scheduler.simulator.observation import NodeRecords, Served
from paraserve_scheduler.simulator.replicas import SimReplica
from paraserve_scheduler.simulator.results import ColdStart, Outcome, RunProgress
from paraserve_scheduler.simulator.serving import Batch, pipeline_batch
from paraserve_scheduler.simulator.trace import Trace
from paraserve_scheduler.simulator.workload import SimRequest

#: How often time alone is looked at, as in the real controller.
TICK_S = 0.5
#: Between two decisions, as the real loop's turn takes; also what keeps decisions apart that
#: would change nothing.
_TURN_S = 0.01


class Simulation:
    def __init__(
        self,
        cluster: ClusterDescription,
        requests: Sequence[SimRequest],
        policy: PolicyFunction,
        *,
        keeps_trace: bool = False,
        watch: Callable[[RunProgress], None] | None = None,
    ) -> None:
        """Prepare a run; `watch` is called at every decision and every tick of virtual time."""
        self.heap = Heap()
        self.trace = Trace(keeps_trace)
        self._meter = Meter(self.heap)
        self._cluster = cluster
        self._policy = policy
        self.nodes = {node.name: NodeMemory.of(node, self._meter) for node in cluster.nodes}
        self.network = Network(self.heap, capacities(cluster.nodes, cluster.store_bytes_per_s))
        self._served = {
            description.name: Served(description=description) for description in cluster.deployments
        }
        #: Those with requests waiting or replicas, in the order in which they came.
        self._active: dict[str, Served] = {}
        self._requests = requests
        self._outcome = Outcome(requests=requests, trace=self.trace)
        self._unfinished = len(requests)
        self._turn_is_due = False
        self._watch = watch
        self._node_records = NodeRecords()

    def run(self) -> Outcome:
        """Run until every request has ended and nothing is left to stop."""
        for failure in self._cluster.failures:
            self.heap.at(failure.at_s, self._lose, failure.node)
            self.heap.at(failure.at_s + failure.for_s, self._recover, failure.node)
        self.heap.after(TICK_S, self._tick)
        self._decide()
        for request in self._requests:
            # Arrivals are in order already: they need no place in the heap.
            while self.heap.next_s() <= request.arrival_s:
                self.heap.step()
            self.heap.now_s = request.arrival_s
            self._arrive(request)
        self._run_out()
        return self._outcome

    def _run_out(self) -> None:
        end_s = self.heap.now_s + _LONGEST_TAIL_S
        while self._unfinished or any(served.replicas for served in self._active.values()):
            if self.heap.next_s() > end_s:
                break
            self.heap.step()
        self._meter.add(0)
        self._outcome.gpu_byte_s = self._meter.byte_s
        self._outcome.moved_bytes = self.network.moved_into(self.nodes)
        self._outcome.ended_s = self.heap.now_s

    # ---- requests ----

    def _arrive(self, request: SimRequest) -> None:
        served = self._served[request.deployment]
        served.note_arrival(self.heap.now_s)
        if not served.queue and self._admit(served, request):
            return
        if not served.takes_one_more():
            request.was_refused = True
            self._unfinished -= 1
            return
        self._active.setdefault(request.deployment, served)
        request.was_cold = True
        served.queue.append(request)
        self._wake()

    def _admit(self, served: Served, request: SimRequest) -> bool:
        """Send it to the least busy ready replica; False if none has a place."""
        best: SimReplica | None = None
        for replica in served.replicas:
            has_place = replica.batch is not None and replica.in_flight < replica.capacity
            if has_place and (best is None or replica.in_flight < best.in_flight):
                best = replica
        if best is None or best.batch is None:
            return False
        request.admitted_s = self.heap.now_s
        best.idle_since_s = None
        best.batch.add(request)
        return True

    def _drain(self, served: Served) -> None:
        while served.queue and self._admit(served, served.queue[0]):
            served.queue.popleft()

    def _request_ended(self, replica: SimReplica, request: SimRequest) -> None:
        served = self._served[request.deployment]
        self._unfinished -= 1
        if request.admitted_s is not None:
            took_s = self.heap.now_s - request.admitted_s
            before_s = served.service_s
            served.service_s = took_s if before_s is None else 0.9 * before_s + 0.1 * took_s
        self._drain(served)
        if replica.in_flight == 0:
            replica.idle_since_s = self.heap.now_s
            self._wake_if_somebody_waits()

    # ---- decisions ----

    def _wake(self) -> None:
        if not self._turn_is_due:
            self._turn_is_due = True
            self.heap.after(_TURN_S, self._turn)

    def _wake_if_somebody_waits(self) -> None:
        if any(served.queue for served in self._active.values()):
            self._wake()

    def _turn(self) -> None:
        self._turn_is_due = False
        self._report()
        self._decide()

    def _tick(self) -> None:
        self.heap.after(TICK_S, self._tick)
        self._report()
        if self._active and not self._turn_is_due:
            self._decide()

    def _report(self) -> None:
        if self._watch is not None:
            count = len(self._requests)
            self._watch(RunProgress(num_done=count - self._unfinished, num_requests=count))

    def _decide(self) -> None:
        self._outcome.decisions += 1
        for decision in self._policy(self._fleet(), self.heap.now_s):
            self._apply(decision)

    def _apply(self, decision: Decision) -> None:
        match decision:
            case Start():
                self._start(decision)
            case Stop():
                self._stop(decision)
            case WarmSlot():
                self._warm(decision)
            case DropSlot():
                node = self.nodes[decision.node]
                node.gpus[decision.gpu].take_slot()
                node.version += 1

    def _fleet(self) -> Fleet:
        claims, uplinks = self.network.claims(), self.network.fetches_by_peer()
        return Fleet(
            nodes=tuple(
                self._node_records.get(node, tuple(claims.get(name, ())), uplinks.get(name, 0))
                for name, node in self.nodes.items()
                if not node.is_lost
            ),
            needs=tuple(served.need for served in self._active.values()),
            store_bytes_per_s=self._cluster.store_bytes_per_s,
            store_fetches=self.network.fetches_from(STORE),
        )

    # ---- replicas ----

    def _start(self, start: Start) -> None:
        served = self._served[start.deployment]
        served.last_number += 1
        replica = SimReplica(
            name=replica_id(start.deployment, served.last_number),
            deployment=served.description,
            start=start,
            stages=list(start.stages),
            started_s=self.heap.now_s,
        )
        self.trace.instant(SpanName.PLAN, self.heap.now_s, replica=replica.name)
        replicas.begin(replica, self, self._replica_ready)
        for stage in replica.stages:
            self._reserve(stage)
        served.replicas.append(replica)
        self._active.setdefault(start.deployment, served)

    def _reserve(self, stage: StageChoice) -> None:
        node = self.nodes[stage.node]
        node.gpus[stage.gpu].reserve(stage.reserved_bytes)
        node.version += 1

    def _release(self, stage: StageChoice, *, leaves_slot: bool) -> None:
        node = self.nodes[stage.node]
        if node.is_lost:
            return
        gpu = node.gpus[stage.gpu]
        gpu.release(stage.reserved_bytes)
        if (
            leaves_slot
            and gpu.slots == 0
            and node.description.kind.start.slot_runtime_s is not None
        ):
            gpu.add_slot()
        node.version += 1

    def _replica_ready(self, replica: SimReplica) -> None:
        now_s = self.heap.now_s
        replica.phase, replica.ready_s, replica.idle_since_s = ReplicaPhase.READY, now_s, now_s
        replica.batch = self._batch(replica)
        self.trace.instant(SpanName.ALL_READY, now_s, replica=replica.name)
        prediction = replica.start.prediction
        self._outcome.cold_starts.append(
            ColdStart(
                replica=replica.name,
                stages=len(replica.stages),
                predicted_s=prediction.ready_s if prediction else None,
                actual_s=now_s - replica.started_s,
            )
        )
        is_pipeline = len(replica.stages) > 1 and replica.deployment.consolidate
        if is_pipeline and any(stage.grows for stage in replica.stages):
            replicas.grow(replica, self, self._grown)
        self._drain(self._served[replica.deployment.name])
        self._wake_if_somebody_waits()

    def _batch(self, replica: SimReplica) -> Batch:
        return pipeline_batch(
            self.heap,
            [self.nodes[stage.node].description.kind for stage in replica.stages],
            replica.model.name,
            full=replica.full,
            ended=lambda request: self._request_ended(replica, request),
        )

    def _grown(self, replica: SimReplica) -> None:
        """The head is the whole replica now; other grown stages are replicas of their own."""
        served = self._served[replica.deployment.name]
        stages, replica.stages = replica.stages, []
        heads = [stage for stage in stages if stage.grows]
        for stage in stages:
            if not stage.grows:
                self._release(stage, leaves_slot=True)
        replica.stages = [_whole(heads[0], replica)]
        assert replica.batch is not None, "only what serves grows"
        replica.batch.reshape(stages=1, full=1, pause_s=self._pause_s(replica, len(stages)))
        for stage in heads[1:]:
            self._split_off(served, replica, stage)
        self._drain(served)
        self._wake_if_somebody_waits()

    def _pause_s(self, replica: SimReplica, stages: int) -> float:
        """How long running requests stand still while the KV cache of other stages moves."""
        if not replica.start.growth.pauses:
            return 0.0
        share = replica.in_flight / (replica.deployment.max_sequences * stages)
        moved = replica.model.kv_bytes * share * (stages - 1) / stages
        return moved / self.nodes[replica.stages[0].node].description.nic_bytes_per_s

    def _split_off(self, served: Served, origin: SimReplica, stage: StageChoice) -> None:
        served.last_number += 1
        now_s = self.heap.now_s
        child = SimReplica(
            name=replica_id(served.description.name, served.last_number),
            deployment=served.description,
            start=origin.start,
            stages=[_whole(stage, origin)],
            started_s=now_s,
            phase=ReplicaPhase.READY,
            ready_s=now_s,
            idle_since_s=now_s,
        )
        child.batch = self._batch(child)
        served.replicas.append(child)

    def _stop(self, stop: Stop) -> None:
        served = self._served[deployment_of(stop.replica)]
        replica = next(
            (replica for replica in served.replicas if replica.name == stop.replica), None
        )
        # A request may have come since the policy was told.
        if replica is None or replica.in_flight or served.queue:
            return
        self._remove(served, replica, leaves_slots=stop.leaves_slots)
        self._wake_if_somebody_waits()

    def _remove(self, served: Served, replica: SimReplica, *, leaves_slots: bool) -> None:
        replica.is_gone = True
        for transfer in replica.transfers:
            self.network.cancel(transfer)
        for stage in replica.stages:
            self._release(stage, leaves_slot=leaves_slots)
        served.replicas.remove(replica)
        if not served.replicas and not served.queue:
            self._active.pop(served.description.name, None)

    def _warm(self, decision: WarmSlot) -> None:
        node = self.nodes[decision.node]
        if decision.gpu in node.warming:
            return
        node.warming.add(decision.gpu)
        self.heap.after(node.description.kind.start.runtime_s, self._warmed, decision)

    def _warmed(self, decision: WarmSlot) -> None:
        node = self.nodes[decision.node]
        if decision.gpu in node.warming:
            node.warming.discard(decision.gpu)
            if node.gpus[decision.gpu].slots == 0:
                node.gpus[decision.gpu].add_slot()
            node.version += 1

    # ---- failures ----

    def _lose(self, name: str) -> None:
        """The node is gone with all it held; what ran there begins again elsewhere."""
        self.nodes[name].lose()
        for served in list(self._active.values()):
            for replica in list(served.replicas):
                if any(stage.node == name for stage in replica.stages):
                    self._outcome.lost_replicas += 1
                    running = replica.batch.stop() if replica.batch else []
                    self._remove(served, replica, leaves_slots=False)
                    served.queue.extendleft(reversed(running))
                    if running:
                        self._active.setdefault(served.description.name, served)
        self._wake()

    def _recover(self, name: str) -> None:
        self.nodes[name].is_lost = False
        self.nodes[name].version += 1
        self._wake()


#: After the last arrival; a policy that never serves a request must not run for ever.
_LONGEST_TAIL_S = 3600.0


def _whole(stage: StageChoice, replica: SimReplica) -> StageChoice:
    return replace(stage, start=0, end=replica.model.num_layers)
