from __future__ import annotations

import asyncio

from paraserve_backend.agent.watchdog import Watchdog
from paraserve_backend.rpc import paraserve_pb2 as pb
from tests.support.agents import AgentHarness, follow, make_part


def make_watchdog(node: AgentHarness) -> Watchdog:
    return Watchdog(
        triton=node.triton,
        stubs=node.processes,
        parts=node.parts,
        slots=node.slots,
        changed=node.changed,
        interval_s=0.01,
    )


async def test_tritons_coming_and_going_is_a_change_and_its_staying_is_none(
    node: AgentHarness,
) -> None:
    watchdog = make_watchdog(node)
    seen = []
    for is_up in (False, True, True, False, False):
        node.triton.is_up = is_up
        node.changed.clear()
        await watchdog.check()
        seen.append((watchdog.triton_live, node.changed.is_set()))
    assert seen == [
        (False, True),
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    ]


async def test_it_keeps_looking_until_it_sees_a_dead_process(node: AgentHarness) -> None:
    await follow(node, make_part())
    node.changed.clear()
    watching = asyncio.create_task(make_watchdog(node).run())
    await node.changed.wait()  # Triton came
    node.changed.clear()
    node.processes.end("tiny.1")
    await node.changed.wait()
    assert node.parts.statuses()[0].phase == pb.FAILED
    watching.cancel()
    await asyncio.wait([watching])
