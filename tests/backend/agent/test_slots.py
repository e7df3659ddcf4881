"""The pool of slots, and parts that bind what is in it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from paraserve_backend.errors import InvalidCheckpoint, ParaServeError
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.tritonserver.host.client import ModelState
from tests.support.agents import (
    AgentHarness,
    agent_harness,
    follow,
    head_part,
    make_part,
    until,
)

SET = ["slot-0.front", "slot-1.stage", "slot-2.link"]
#: Longer than a pause after anything.
LONG_S = 60


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[AgentHarness]:
    """A node on which nothing is left once its parts and slots are removed."""
    async with agent_harness(tmp_path) as node:
        yield node
        await node.parts.remove_all()
        await node.slots.remove_all()
        await node.assert_nothing_left()


async def keep(node: AgentHarness, idle_sets: int) -> None:
    """Have so many idle sets, when the node has been quiet for long."""
    node.slots.keep(idle_sets)
    node.now_s[0] += LONG_S
    await node.slots.tend()


def alive(node: AgentHarness) -> list[str]:
    return sorted(stub.model for stub in node.processes.find())


def slots_alive(node: AgentHarness) -> list[str]:
    return [model for model in alive(node) if model.startswith("slot-")]


def commands(node: AgentHarness) -> list[tuple[str, str]]:
    """The slots that got a command, and which one."""
    return [(model, next(iter(json.loads(command)))) for model, command in node.triton.commands]


async def test_as_many_sets_are_loaded_as_are_wanted_and_no_more_than_the_setting(
    node: AgentHarness,
) -> None:
    for wanted, there in ((1, 1), (2, 2), (7, 2), (1, 1), (0, 0)):
        await keep(node, wanted)
        assert node.slots.idle_sets == there
        assert len(alive(node)) == 3 * there
        assert await node.slots.idle_bytes() == 3 * there * 1000


async def test_a_cold_start_binds_idle_slots_instead_of_loading(
    node: AgentHarness, tmp_path: Path
) -> None:
    await keep(node, 1)
    node.triton.loads.clear()
    last = (await follow(node, head_part()))[-1]
    assert last.phase == pb.READY
    assert node.triton.loads == ["tiny.1.forward"]
    assert dict(last.slots) == {
        "tiny.1": "slot-0.front",
        "tiny.1.stage0": "slot-1.stage",
        "tiny.1.link": "slot-2.link",
    }
    config = (tmp_path / "models" / "tiny.1.forward" / "config.pbtxt").read_text()
    assert "slot-1.stage" in config
    assert "tiny.1" not in config
    names = [span.name for span in last.spans]
    assert names == ["write models", *(f"bind {slot}" for slot in SET), "load tiny.1.forward"]
    assert node.slots.idle_sets == 0
    assert await node.slots.idle_bytes() == 0


async def test_a_slot_is_told_the_parameters_of_the_models_own_config(node: AgentHarness) -> None:
    await keep(node, 1)
    await follow(node, head_part())
    told = {model: json.loads(command)["bind"] for model, command in node.triton.commands}
    assert told["slot-1.stage"] == {"role": "stage", "replica": "tiny.1"}


async def test_going_to_zero_keeps_the_processes_for_the_next(node: AgentHarness) -> None:
    await keep(node, 1)
    before = node.processes.find()
    for replica in ("tiny.1", "small.1", "tiny.2"):
        assert (await follow(node, head_part(replica)))[-1].phase == pb.READY
        await node.parts.remove(replica)
        assert node.slots.idle_sets == 1
    assert node.processes.find() == before
    assert not set(SET) & set(node.processes.cleaned)  # their shared memory is in use
    assert [verb for _, verb in commands(node)] == (3 * ["bind"] + 3 * ["unbind"]) * 3


async def test_what_finds_no_slot_is_loaded(node: AgentHarness) -> None:
    await keep(node, 1)
    await follow(node, head_part("tiny.1"))
    last = (await follow(node, head_part("small.1")))[-1]
    assert last.phase == pb.READY
    assert dict(last.slots) == {}
    assert {"small.1", "small.1.stage0", "small.1.link"} < set(alive(node))


async def test_the_pool_is_filled_only_when_no_part_starts_and_a_while_after(
    node: AgentHarness,
) -> None:
    await keep(node, 1)
    node.triton.gates["slot-1.stage"] = asyncio.Event()
    progress = await node.parts.apply(head_part())
    await until(lambda: len(node.triton.commands) == 3)
    node.now_s[0] += LONG_S
    await node.slots.tend()
    assert slots_alive(node) == SET  # the part still starts
    node.triton.gates["slot-1.stage"].set()
    assert [status async for status in progress.follow()][-1].phase == pb.READY
    await node.slots.tend()
    assert slots_alive(node) == SET  # it has just become ready
    node.now_s[0] += LONG_S
    await node.slots.tend()
    assert node.slots.idle_sets == 1
    await node.parts.remove("tiny.1")  # gives its slots back
    await node.slots.tend()
    assert (node.slots.idle_sets, len(alive(node))) == (1, 3)


async def test_an_idle_slot_whose_process_died_is_replaced(node: AgentHarness) -> None:
    await keep(node, 1)
    node.processes.end("slot-1.stage")
    node.changed.clear()
    node.observe()
    assert node.slots.idle_sets == 1  # that look may have been older than the slot
    node.observe()
    assert node.slots.idle_sets == 0
    assert node.changed.is_set()  # the scheduler hears of it
    await keep(node, 1)
    assert alive(node) == ["slot-0.front", "slot-2.link", "slot-3.stage"]
    assert node.models_on_disk() == alive(node)


async def test_a_part_that_loses_a_bound_process_fails_and_frees_the_others(
    node: AgentHarness,
) -> None:
    await keep(node, 1)
    await follow(node, head_part())
    node.observe()
    node.processes.end("slot-1.stage")
    node.observe()
    (status,) = node.parts.statuses()
    assert status.phase == pb.FAILED
    assert status.failure.message == "The process of model tiny.1.stage0 died."
    await until(lambda: ("slot-2.link", "unbind") in commands(node))
    await node.parts.remove("tiny.1")
    assert ("slot-1.stage", "unbind") not in commands(node)
    assert alive(node) == ["slot-0.front", "slot-2.link"]


async def test_a_process_that_dies_while_it_is_bound_fails_the_part(node: AgentHarness) -> None:
    await keep(node, 1)
    node.triton.gates["slot-0.front"] = asyncio.Event()
    progress = await node.parts.apply(head_part())
    await until(lambda: len(node.triton.commands) == 3)
    # Nobody had a look at the process since it was bound.
    node.processes.end("slot-0.front")
    for _ in range(2):
        node.observe()
        node.now_s[0] += LONG_S
    last = [status async for status in progress.follow()][-1]
    assert last.failure.message == "The process of model tiny.1 died while it loaded."
    node.triton.gates["slot-0.front"].set()


async def test_a_bind_that_fails_fails_the_part_with_its_reason_and_ends_the_process(
    node: AgentHarness,
) -> None:
    await keep(node, 1)
    node.triton.command_error = InvalidCheckpoint("Tensor x is missing.")
    last = (await follow(node, head_part()))[-1]
    assert last.failure == pb.Failure(grpc_code="INVALID_ARGUMENT", message="Tensor x is missing.")
    await node.parts.remove("tiny.1")
    assert alive(node) == []
    node.triton.command_error = None
    await keep(node, 1)
    assert node.slots.idle_sets == 1


@pytest.mark.parametrize("is_hung", [False, True])
async def test_a_slot_that_does_not_let_go_is_killed(node: AgentHarness, is_hung: bool) -> None:
    await keep(node, 1)
    await follow(node, head_part())
    node.triton.gates["slot-0.front"] = asyncio.Event()  # never answers
    if is_hung:
        node.triton.hung.add("slot-0.front")
    await node.parts.remove("tiny.1", deadline_s=0.05)
    assert alive(node) == ["slot-1.stage", "slot-2.link"]
    assert node.processes.killed == (["slot-0.front"] if is_hung else [])


async def test_a_slot_that_its_part_ends_is_ended_once(node: AgentHarness) -> None:
    await keep(node, 1)
    await follow(node, head_part())
    node.triton.gates["slot-0.front"] = asyncio.Event()  # never answers
    node.triton.hung.add("slot-0.front")
    removing = asyncio.create_task(node.parts.remove("tiny.1", deadline_s=0.01))
    await until(lambda: "slot-0.front" in node.triton.unloads)
    await keep(node, 1)  # looks after what is broken at the same time
    await removing
    assert node.triton.unloads.count("slot-0.front") == 1
    assert node.slots.idle_sets == 1


async def test_a_removal_while_a_slot_is_bound_ends_its_process(node: AgentHarness) -> None:
    await keep(node, 1)
    gate = node.triton.gates["slot-1.stage"] = asyncio.Event()
    await node.parts.apply(head_part())
    await until(lambda: len(node.triton.commands) == 3)
    await node.parts.remove("tiny.1")
    # What the bind would have made is not to be trusted any more.
    assert "slot-1.stage" not in alive(node)
    gate.set()


async def test_a_load_that_fails_is_tried_again_only_after_a_while(node: AgentHarness) -> None:
    node.triton.load_errors["slot-1.stage"] = ParaServeError("No torch.")
    await keep(node, 1)
    await node.slots.tend()
    assert node.triton.loads == ["slot-0.front", "slot-1.stage"]
    assert alive(node) == ["slot-0.front"]
    await keep(node, 1)
    assert node.slots.idle_sets == 1


async def test_a_start_that_comes_while_slots_are_loaded_has_at_most_one_of_them_beside_it(
    node: AgentHarness,
) -> None:
    gate = node.triton.gates["slot-0.front"] = asyncio.Event()
    keeping = asyncio.create_task(keep(node, 1))
    while not node.triton.loads:
        await asyncio.sleep(0)
    with node.slots.cold_start():
        gate.set()
        await keeping
        assert node.triton.loads == ["slot-0.front"]
    await keep(node, 1)
    assert node.slots.idle_sets == 1


async def test_slots_come_back_when_triton_does(node: AgentHarness) -> None:
    await keep(node, 1)
    node.triton.is_up = False
    for slot in SET:
        node.processes.end(slot)
    for _ in range(2):
        node.observe(triton_live=False)
    await keep(node, 1)
    assert node.slots.idle_sets == 0
    node.triton.is_up = True
    await keep(node, 1)
    assert node.slots.idle_sets == 1


async def test_a_replica_in_a_slot_hands_over_there(node: AgentHarness) -> None:
    await keep(node, 1)
    await follow(node, head_part())
    await node.parts.hand_over(pb.HandOverRequest(replica="tiny.1"))
    assert node.triton.commands[-1] == ("slot-0.front", '{"hand_over": []}')


async def test_slots_that_are_wanted_come_and_go_by_themselves(node: AgentHarness) -> None:
    running = asyncio.create_task(node.slots.run())
    node.slots.keep(1)
    await until(lambda: node.slots.idle_sets == 1)
    node.slots.keep(0)
    await until(lambda: alive(node) == [])
    running.cancel()
    await asyncio.wait([running])


async def test_models_that_are_no_roles_of_ours_use_no_slot(node: AgentHarness) -> None:
    await keep(node, 1)
    assert (await follow(node, make_part()))[-1].phase == pb.READY
    assert node.slots.idle_sets == 1
    assert (await node.triton.states())["tiny.1"] is ModelState.READY
