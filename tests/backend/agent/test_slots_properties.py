"""Whatever happens on a node: no slot is in two parts, and in the end nothing is left."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from paraserve_backend.rpc import paraserve_pb2 as pb
from tests.support.agents import AgentHarness, agent_harness, follow, head_part

REPLICAS = ("tiny.1", "small.1", "small.2")
Step = tuple[str, str | int]
STEPS = st.one_of(
    st.tuples(st.just("start"), st.sampled_from(REPLICAS)),
    st.tuples(st.just("remove"), st.sampled_from(REPLICAS)),
    st.tuples(st.just("keep"), st.integers(0, 2)),
    # Counted from the oldest process.
    st.tuples(st.just("kill"), st.integers(0, 9)),
)


async def take(node: AgentHarness, step: Step) -> None:
    match step:
        case ("start", str(replica)):
            await follow(node, head_part(replica))
        case ("remove", str(replica)):
            await node.parts.remove(replica)
        case ("keep", int(number)):
            node.slots.keep(number)
        case ("kill", int(number)):
            found = node.processes.find()
            if number < len(found):
                node.processes.end(found[number].model)
    for _ in range(2):
        node.observe()
    node.now_s[0] += 60
    await node.slots.tend()


def check(node: AgentHarness, wanted: int) -> None:
    serving = [status for status in node.parts.statuses() if status.phase == pb.READY]
    bound = sorted(slot for status in serving for slot in status.slots.values())
    assert all(a != b for a, b in pairwise(bound)), "a slot is two models"
    alive = {stub.model for stub in node.processes.find()}
    assert set(bound) <= alive
    assert node.slots.idle_sets == wanted


@settings(max_examples=40, deadline=None)
@given(st.lists(STEPS, max_size=8))
async def test_slots_are_never_shared_never_short_and_never_left(steps: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with agent_harness(Path(folder)) as node:
            wanted = 0
            for step in steps:
                wanted = int(step[1]) if step[0] == "keep" else wanted
                await take(node, step)
                await take(node, ("keep", wanted))
                check(node, wanted)
            await node.parts.remove_all()
            await take(node, ("keep", 0))
            await node.assert_nothing_left()
