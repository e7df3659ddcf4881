"""The control loop: takes in events, asks the reconciler what to do, and carries it out.

It alone changes the view of the cluster, on one event loop. It decides nothing itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from typing import NoReturn, TypeVar

from paraserve_backend.errors import Unavailable
from paraserve_backend.protocol.names import fetch_id
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.control_plane.config import SchedulerConfig
from paraserve_scheduler.control_plane.controller.agents import AgentCallFailed, Agents
from paraserve_scheduler.control_plane.controller.clock import Clock
from paraserve_scheduler.control_plane.messages.agents import part_message, peer_addresses
from paraserve_scheduler.reconciler.capacity import is_alive
from paraserve_scheduler.reconciler.decide import decide
from paraserve_scheduler.reconciler.turn import Turn
from paraserve_scheduler.state.actions import (
    Action,
    HandOver,
    KeepSlots,
    RemovePart,
    RemoveReplica,
    StartReplica,
)
from paraserve_scheduler.state.begin import Begun, begin
from paraserve_scheduler.state.events import (
    DeletionRequested,
    DeploymentAdded,
    Event,
    HandOverFailed,
    HandOverNotified,
    PartRemoved,
    PartReported,
    ReplicaRemoved,
    SchedulerStalled,
    SlotsRefused,
)
from paraserve_scheduler.state.fold import fold
from paraserve_scheduler.state.plans import ReplicaPlan
from paraserve_scheduler.state.records import PartState, Phase
from paraserve_scheduler.state.spec import Deployment
from paraserve_scheduler.state.view import ClusterView
from paraserve_scheduler.store import recovery
from paraserve_scheduler.store.sqlite import Store

logger = logging.getLogger(__name__)

#: How often time alone is looked at: keep-alive, lost nodes, time limits.
TICK_S = 0.5
#: A turn that comes so late was not waiting for its time: nothing could be heard meanwhile.
_STALLED_S = 1.0
#: A lost node is asked all the same, but nobody waits long for it.
_LOST_NODE_TIMEOUT_S = 2.0

_Projection = TypeVar("_Projection")


class Controller:
    def __init__(
        self, *, store: Store, agents: Agents, clock: Clock, config: SchedulerConfig
    ) -> None:
        self._store = store
        self._agents = agents
        self._clock = clock
        self._config = config
        self._view = recovery.recover(store, clock.now_s())
        self._wake = asyncio.Event()
        #: Set at the next change, then replaced: everybody who waits for it gets to know.
        self._changed = asyncio.Event()
        self._applies: defaultdict[str, set[asyncio.Task[None]]] = defaultdict(set)
        #: While it runs.
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def view(self) -> ClusterView:
        return self._view

    def now_s(self) -> float:
        return self._clock.now_s()

    def turn(self) -> Turn:
        """The cluster as it is now, to decide on."""
        return Turn(view=self._view, now_s=self.now_s(), config=self._config.policy)

    def notify(self, event: Event) -> None:
        """Take in what happened; the loop acts on it in its next turn."""
        self._set_view(fold(self._view, event))

    def add_deployment(self, deployment: Deployment) -> None:
        counters = self._store.counters(deployment.name)
        self.notify(
            DeploymentAdded(
                deployment=deployment,
                last_number=counters.last_number,
                failure_number=counters.failure_number,
                at_s=self.now_s(),
            )
        )

    async def delete_deployment(self, name: str) -> None:
        """Return when no replica of it is left on any node."""
        self.notify(DeletionRequested(deployment=name))
        async for is_there in self.watch(lambda view: name in view.deployments):
            if not is_there:
                return

    def carry_out(self, action: Action) -> None:
        """Begin what a user ordered; `action` must be possible now.

        Raises:
            Unavailable: the loop does not run yet.
        """
        if self._tasks is None:
            raise Unavailable("The scheduler is still starting; retry shortly.")
        self._begin(action, self.now_s(), self._tasks)

    async def watch(
        self, project: Callable[[ClusterView], _Projection]
    ) -> AsyncIterator[_Projection]:
        """Yield what `project` makes of the view, at once and whenever that changes."""
        last: _Projection | None = None
        while True:
            changed = self._changed
            value = project(self._view)
            if value != last:
                last = value
                yield value
            await changed.wait()

    async def run(self) -> NoReturn:
        """Control until cancelled; replicas stay as they are then. Any bug ends it."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            while True:
                self._wake.clear()
                turn = self.turn()
                for action in decide(turn):
                    self._begin(action, turn.now_s, tasks)
                late_s = await self._clock.wait(self._wake, TICK_S)
                if late_s > _STALLED_S:
                    logger.warning("this process stood still for %.1f s", late_s)
                    self.notify(SchedulerStalled(at_s=self.now_s()))

    def _set_view(self, view: ClusterView) -> None:
        recovery.record(self._store, self._view, view)
        self._view = view
        self._wake.set()
        self._changed.set()
        self._changed = asyncio.Event()

    def _begin(self, action: Action, now_s: float, tasks: asyncio.TaskGroup) -> None:
        name = type(action).__name__
        logger.info(
            "%s %s: %s",
            name,
            action.subject,
            action.reason,
            extra={"action": name, "subject": action.subject, "reason": action.reason},
        )
        self._set_view(begin(self._view, Begun(action=action, at_s=now_s)))
        match action:
            case StartReplica():
                self._start(action.plan, tasks)
            case RemoveReplica():
                removal = self._remove_replica(action.replica)
                tasks.create_task(removal, name=f"remove {action.subject}")
            case RemovePart():
                removal = self._remove_part(action.node, action.replica)
                tasks.create_task(removal, name=f"remove {action.subject}")
            case HandOver():
                self._hand_over(action, tasks)
            case KeepSlots():
                tasks.create_task(self._keep_slots(action), name=f"slots on {action.node}")

    def _start(self, plan: ReplicaPlan, tasks: asyncio.TaskGroup) -> None:
        deployment = self._view.deployments[plan.deployment].deployment
        keys = self._store.channel_keys(plan.deployment)
        for stage, where in enumerate(plan.stages):
            peers = peer_addresses(self.turn(), deployment, where.node)
            part = part_message(deployment, plan, stage, keys, peers)
            address = self._view.nodes[where.node].info.agent_address
            name = f"apply {fetch_id(plan.replica, stage)}"
            task = tasks.create_task(self._apply(address, part), name=name)
            self._applies[plan.replica].add(task)

    async def _apply(self, address: str, part: pb.Part) -> None:
        try:
            async for state in self._agents.apply(address, part):
                self.notify(PartReported(part=state, at_s=self.now_s()))
        except AgentCallFailed as error:
            failed = PartState(
                replica=part.replica,
                stage=part.stage,
                phase=Phase.FAILED,
                failure=error.failure,
            )
            self.notify(PartReported(part=failed, at_s=self.now_s()))

    def _hand_over(self, action: HandOver, tasks: asyncio.TaskGroup) -> None:
        replicas, nodes = self._view.replicas, self._view.nodes
        address = nodes[replicas[action.replica].plan.head.node].info.agent_address
        urls = {successor: replicas[successor].plan.inbox_url for successor in action.successors}
        notifying = self._notify_head(address, action.replica, urls)
        tasks.create_task(notifying, name=f"hand over {action.replica}")

    async def _notify_head(self, address: str, replica: str, urls: Mapping[str, str]) -> None:
        try:
            await self._agents.hand_over(address, replica, urls)
        except AgentCallFailed as error:
            logger.warning("could not have %s hand over: %s", replica, error)
            self.notify(HandOverFailed(replica=replica, at_s=self.now_s()))
        else:
            self.notify(HandOverNotified(replica=replica, successors=tuple(urls)))

    async def _keep_slots(self, action: KeepSlots) -> None:
        address = self._view.nodes[action.node].info.agent_address
        try:
            await self._agents.keep_slots(address, action.idle_slots)
        except AgentCallFailed as error:
            logger.warning("could not have %s keep slots: %s", action.node, error)
            self.notify(SlotsRefused(node=action.node))

    async def _remove_replica(self, name: str) -> None:
        for task in self._applies.pop(name, ()):
            task.cancel()
        replica, config = self._view.replicas[name], self._config
        has_failed = replica.failure is not None
        timeout_s = config.failed_remove_timeout_s if has_failed else config.remove_timeout_s
        nodes = [stage.node for stage in replica.plan.stages]
        await asyncio.gather(*(self._remove_from(node, name, timeout_s) for node in nodes))
        self.notify(ReplicaRemoved(replica=name, at_s=self.now_s()))

    async def _remove_part(self, node: str, replica: str) -> None:
        await self._remove_from(node, replica, self._config.remove_timeout_s)
        self.notify(PartRemoved(node=node, replica=replica))

    async def _remove_from(self, name: str, replica: str, timeout_s: float) -> None:
        node = self._view.nodes.get(name)
        if node is None:
            return
        alive = is_alive(self.turn(), node)
        limit_s = timeout_s if alive else _LOST_NODE_TIMEOUT_S
        try:
            await self._agents.remove(node.info.agent_address, replica, limit_s)
        except AgentCallFailed as error:
            # Should it still be there, the node's next heartbeat says so and it is tried again.
            logger.warning("could not remove %s from node %s: %s", replica, name, error)
