"""Fakes for tests, and for users who write a policy: a clock set by hand, nodes without processes.

Nothing here sleeps or opens a socket.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping

from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.control_plane.controller.agents import AgentCallFailed
from paraserve_scheduler.state.events import NodeRegistered, NodeReported
from paraserve_scheduler.state.records import Failure, NodeInfo, PartState, Phase


class ManualClock:
    """`Clock` that stands still until `advance`."""

    def __init__(self, now_s: float = 1_000.0) -> None:
        self._now_s = now_s
        self._moved = asyncio.Event()
        self._late_s = 0.0

    def now_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float, *, late: bool = False) -> None:
        """Move time on; `late`: as if whoever waits had stood still meanwhile."""
        self._now_s += seconds
        self._late_s = seconds if late else 0.0
        self._moved.set()
        self._moved = asyncio.Event()

    async def wait(self, event: asyncio.Event, timeout_s: float) -> float:
        """Return when `event` is set or the clock was moved, however little."""
        waits = [asyncio.create_task(each.wait()) for each in (event, self._moved)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        late_s, self._late_s = self._late_s, 0.0
        return late_s


class FakeAgent:
    """One node's agent: takes parts and has them ready at once, unless told otherwise."""

    def __init__(self, info: NodeInfo) -> None:
        self.info = info
        self.parts: dict[tuple[str, int], PartState] = {}
        #: Every part it was told to apply, and every replica it was told to remove.
        self.applied: list[pb.Part] = []
        self.removed: list[str] = []
        self.reachable = True
        self.triton_live = True
        #: Parts become ready only while this is set.
        self.may_finish = asyncio.Event()
        self.may_finish.set()
        #: What replicas here were told to hand over to: replica to (successor to URL).
        self.hand_overs: dict[str, dict[str, str]] = {}
        self.refuses_hand_overs = False
        self.wanted_slots: int | None = None
        #: What the next parts fail with instead of becoming ready, one each.
        self.failures: deque[Failure] = deque()

    def registered(self, at_s: float) -> NodeRegistered:
        return NodeRegistered(info=self.info, at_s=at_s)

    def heartbeat(self, at_s: float) -> NodeReported:
        return NodeReported(
            node=self.info.name,
            triton_live=self.triton_live,
            parts=tuple(self.parts.values()),
            tier_used_bytes=0,
            at_s=at_s,
        )

    def set_part(
        self, replica: str, stage: int, phase: Phase, failure: Failure | None = None
    ) -> PartState:
        state = PartState(replica=replica, stage=stage, phase=phase, failure=failure)
        self.parts[replica, stage] = state
        return state


class FakeAgents:
    """`Agents` over `FakeAgent`s."""

    def __init__(self, nodes: Iterable[FakeAgent]) -> None:
        self._nodes = {node.info.agent_address: node for node in nodes}

    async def apply(self, address: str, part: pb.Part) -> AsyncIterator[PartState]:
        node = self._reach(address)
        node.applied.append(part)
        yield node.set_part(part.replica, part.stage, Phase.STARTING)
        await node.may_finish.wait()
        failure = node.failures.popleft() if node.failures else None
        phase = Phase.READY if failure is None else Phase.FAILED
        yield node.set_part(part.replica, part.stage, phase, failure)

    async def remove(self, address: str, replica: str, deadline_s: float) -> None:
        node = self._reach(address)
        node.removed.append(replica)
        node.parts = {key: part for key, part in node.parts.items() if part.replica != replica}

    async def hand_over(self, address: str, replica: str, successors: Mapping[str, str]) -> None:
        node = self._reach(address)
        if node.refuses_hand_overs:
            raise AgentCallFailed(Failure(grpc_code="UNAVAILABLE", message="no time"))
        node.hand_overs[replica] = dict(successors)

    async def keep_slots(self, address: str, idle_slots: int) -> None:
        self._reach(address).wanted_slots = idle_slots

    def _reach(self, address: str) -> FakeAgent:
        node = self._nodes[address]
        if not node.reachable:
            message = f"The agent at {address} cannot be reached."
            raise AgentCallFailed(Failure(grpc_code="UNAVAILABLE", message=message))
        return node
