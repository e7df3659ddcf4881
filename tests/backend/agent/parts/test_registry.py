from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from paraserve_backend.agent.parts.registry import Parts
from paraserve_backend.errors import (
    DeadlineExceeded,
    InvalidCheckpoint,
    InvalidRequest,
    NotFound,
    ParaServeError,
    Unavailable,
)
from paraserve_backend.rpc import paraserve_pb2 as pb
from tests.support.agents import (
    AgentHarness,
    agent_harness,
    follow,
    make_part,
    make_plan,
    make_request,
    until,
)
from tests.support.limits import HANG_S


def phases(parts: Parts) -> list[pb.Phase.ValueType]:
    return [status.phase for status in parts.statuses()]


async def test_waves_load_in_order_and_unload_in_reverse(node: AgentHarness) -> None:
    part = make_part("tiny.1.stage0", "tiny.1.forward", "tiny.1")
    assert (await follow(node, part))[-1].phase == pb.READY
    assert node.triton.loads == ["tiny.1.stage0", "tiny.1.forward", "tiny.1"]
    await node.parts.remove("tiny.1")
    assert node.triton.unloads == node.triton.loads[::-1]
    await node.assert_nothing_left()


async def test_models_of_one_wave_load_at_the_same_time(node: AgentHarness) -> None:
    part = make_part("tiny.1", "tiny.1.link")
    for model in part.models:
        model.load_wave = 0
    # Each load ends only once both have begun.
    node.triton.gates = {"tiny.1": asyncio.Event(), "tiny.1.link": asyncio.Event()}
    progress = await node.parts.apply(part)
    await until(lambda: len(node.triton.loads) == 2)
    for gate in node.triton.gates.values():
        gate.set()
    assert [status async for status in progress.follow()][-1].phase == pb.READY


async def test_the_fetch_and_the_load_run_at_the_same_time(
    node: AgentHarness, tmp_path: Path
) -> None:
    gate = node.triton.gates["tiny.1"] = asyncio.Event()
    plan = make_plan(tmp_path / "model")
    progress = await node.parts.apply(make_part(plan=plan))
    async for status in progress.follow():
        assert status.phase in (pb.STARTING, pb.READY)
        if status.fetched_bytes == plan.total_bytes:
            gate.set()  # all bytes are here while the load still waits
    assert status.phase == pb.READY


async def test_news_says_when_each_step_began_and_ended(node: AgentHarness, tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "model")
    last = (await follow(node, make_part(plan=plan)))[-1]
    assert [span.name for span in last.spans] == ["write models", "fetch", "load tiny.1"]
    assert [span.bytes for span in last.spans] == [0, plan.total_bytes, 0]
    assert all(span.end_s == node.now_s[0] for span in last.spans)


async def test_a_second_apply_attaches_to_the_first(node: AgentHarness) -> None:
    first, second = await asyncio.gather(follow(node, make_part()), follow(node, make_part()))
    assert first[-1] == second[-1]
    assert node.triton.loads == ["tiny.1"]


async def test_two_stages_of_a_replica_on_one_node_are_removed_together(node: AgentHarness) -> None:
    for stage in (0, 1):
        part = make_part(f"tiny.1.stage{stage}", keys=True)
        part.stage = stage
        assert (await follow(node, part))[-1].phase == pb.READY
    await follow(node, make_part(replica="tiny.2"))
    assert await node.parts.remove("tiny.1") is True
    assert node.models_on_disk() == ["tiny.2"]
    assert [status.replica for status in node.parts.statuses()] == ["tiny.2"]


async def test_a_failed_load_takes_the_loaded_models_and_the_bytes_away(
    node: AgentHarness, tmp_path: Path
) -> None:
    node.triton.load_errors["tiny.1"] = InvalidCheckpoint("Tensor x is missing.")
    part = make_part("tiny.1.stage0", "tiny.1", plan=make_plan(tmp_path / "m"), keys=True)
    last = (await follow(node, part))[-1]
    assert last.phase == pb.FAILED
    assert last.failure == pb.Failure(grpc_code="INVALID_ARGUMENT", message="Tensor x is missing.")
    await until(lambda: node.models_on_disk() == [])
    assert phases(node.parts) == [pb.FAILED]  # until it is removed
    assert await node.parts.remove("tiny.1") is True
    await node.assert_nothing_left()


async def test_a_failed_fetch_is_told_although_the_load_still_waits(
    node: AgentHarness, tmp_path: Path
) -> None:
    node.triton.gates["tiny.1"] = gate = asyncio.Event()
    plan = make_plan(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "gone")
    last = (await follow(node, make_part(plan=plan)))[-1]
    assert last.failure.grpc_code == "NOT_FOUND"
    gate.set()
    await node.parts.remove("tiny.1")
    await node.assert_nothing_left()


async def test_an_unexpected_error_is_reported_without_its_details(
    node: AgentHarness, tmp_path: Path
) -> None:
    # A folder where the file of keys should be.
    in_the_way = tmp_path / "keys" / "tiny.1" / "curve.key"
    in_the_way.mkdir(parents=True)
    last = (await follow(node, make_part(keys=True)))[-1]
    assert last.failure.grpc_code == "INTERNAL"
    assert str(tmp_path) not in last.failure.message
    assert "Error" in last.failure.message
    in_the_way.rmdir()
    in_the_way.parent.rmdir()
    await node.assert_nothing_left()


async def test_a_load_whose_answer_is_late_counts_once_the_model_is_ready(
    node: AgentHarness,
) -> None:
    gate = node.triton.gates["tiny.1"] = asyncio.Event()
    node.triton.late["tiny.1"] = DeadlineExceeded("Triton did not answer in time.")
    progress = await node.parts.apply(make_part())
    await until(lambda: node.triton.loads == ["tiny.1"])
    gate.set()
    assert [status async for status in progress.follow()][-1].phase == pb.READY


async def test_a_part_that_misses_its_deadline_says_so(tmp_path: Path) -> None:
    async with agent_harness(tmp_path, part_deadline_s=0.01) as node:
        gate = node.triton.gates["tiny.1"] = asyncio.Event()
        last = (await follow(node, make_part()))[-1]
        assert last.failure.grpc_code == "DEADLINE_EXCEEDED"
        assert last.failure.message == "Stage 0 of tiny.1 was not ready within 0.01 s."
        gate.set()


async def test_a_removal_waits_for_the_running_load_and_ends_the_stream(
    node: AgentHarness, tmp_path: Path
) -> None:
    gate = node.triton.gates["tiny.1"] = asyncio.Event()
    following = asyncio.create_task(follow(node, make_part(plan=make_plan(tmp_path / "m"))))
    await until(lambda: node.triton.loads == ["tiny.1"])
    removing = asyncio.create_task(node.parts.remove("tiny.1"))
    await until(lambda: node.triton.unloads == ["tiny.1"])
    assert phases(node.parts) == [pb.STOPPING]
    assert not removing.done()
    gate.set()
    assert await removing is True
    assert (await following)[-1].phase == pb.STOPPED
    assert node.processes.killed == []
    await node.assert_nothing_left()


async def test_an_apply_during_a_removal_comes_after_it(node: AgentHarness) -> None:
    await follow(node, make_part())
    removing = asyncio.create_task(node.parts.remove("tiny.1"))
    await until(lambda: phases(node.parts) == [pb.STOPPING])
    last = (await follow(node, make_part()))[-1]
    assert removing.done()
    assert last.phase == pb.READY
    assert node.triton.loads == ["tiny.1", "tiny.1"]


async def test_a_removal_goes_on_when_its_caller_gives_up(node: AgentHarness) -> None:
    await follow(node, make_part())
    removing = asyncio.create_task(node.parts.remove("tiny.1"))
    await until(lambda: phases(node.parts) == [pb.STOPPING])
    removing.cancel()
    await until(lambda: node.parts.statuses() == [])
    await node.assert_nothing_left()


async def test_removing_what_is_not_there_is_no_error(node: AgentHarness) -> None:
    assert await node.parts.remove("tiny.1") is False


async def test_a_removal_whose_process_survives_fails_and_can_be_tried_again(
    tmp_path: Path,
) -> None:
    async with agent_harness(tmp_path, kill_s=0.5) as node:
        await follow(node, make_part())
        node.triton.hung.add("tiny.1")
        node.processes.unkillable = True
        with pytest.raises(DeadlineExceeded, match=r"tiny\.1 did not end even when killed"):
            await node.parts.remove("tiny.1", deadline_s=0.01)
        assert phases(node.parts) == [pb.STOPPING]
        node.processes.unkillable = False
        assert await node.parts.remove("tiny.1", deadline_s=0.01) is True
        await node.assert_nothing_left()


async def test_a_dead_process_fails_a_serving_part_at_once_and_is_cleaned_up(
    node: AgentHarness,
) -> None:
    await follow(node, make_part("tiny.1.stage0", "tiny.1"))
    node.observe()
    assert phases(node.parts) == [pb.READY]
    node.changed.clear()
    node.triton.hung.add("tiny.1.stage0")  # its requests will never end
    node.processes.end("tiny.1.stage0")
    node.observe()
    assert node.changed.is_set()
    assert node.parts.statuses()[0].failure == pb.Failure(
        grpc_code="UNAVAILABLE", message="The process of model tiny.1.stage0 died."
    )
    assert await node.parts.remove("tiny.1", deadline_s=10) is True
    assert "tiny.1.stage0" in node.processes.cleaned
    await node.assert_nothing_left()


async def test_a_lost_triton_fails_its_parts_and_does_not_hold_up_their_removal(
    node: AgentHarness,
) -> None:
    await follow(node, make_part())
    node.triton.is_up = False
    node.processes.end("tiny.1")
    node.observe(triton_live=False)
    assert node.parts.statuses()[0].failure.message == "Triton stopped."
    assert await node.parts.remove("tiny.1") is True
    await node.assert_nothing_left()


async def test_a_failure_nobody_removes_is_forgotten_after_a_while(node: AgentHarness) -> None:
    node.triton.load_errors["tiny.1"] = ParaServeError("no")
    await follow(node, make_part())
    await until(lambda: node.models_on_disk() == [])
    node.now_s[0] += 299
    node.observe()
    assert phases(node.parts) == [pb.FAILED]
    node.now_s[0] += 2

    def is_forgotten() -> bool:
        node.observe()
        return node.parts.statuses() == []

    await until(is_forgotten)
    assert (await follow(node, make_part()))[-1].phase == pb.FAILED


async def test_removing_a_replica_releases_fetches_without_a_part(
    node: AgentHarness, tmp_path: Path
) -> None:
    plan = make_plan(tmp_path / "model", "tiny.1.3")
    other = make_plan(tmp_path / "other", "tiny.11.3")
    for each in (plan, other):
        await (await node.fetches.start(make_request(each), HANG_S)).wait()
    assert await node.parts.remove("tiny.1") is True
    objects, _ = await node.fetches.contents()
    assert {found.key.startswith(f"file:// {other.source_uri}/") for found in objects} == {True}


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        (make_part("other"), "Model other does not belong to tiny.1"),
        (make_part("tiny.10"), "Model tiny.10 does not belong to tiny.1"),
        (make_part(replica="../up"), "cannot name a model"),
        (pb.Part(replica="tiny.1"), "no models"),
        (pb.Part(replica="tiny.1", models=[pb.ModelFiles(name="tiny.1/x")]), "cannot name"),
    ],
)
async def test_a_malformed_part_is_refused_and_leaves_no_record(
    node: AgentHarness, part: pb.Part, sentence: str
) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        await node.parts.apply(part)
    assert node.parts.statuses() == []


async def test_a_malformed_fetch_plan_is_refused(node: AgentHarness) -> None:
    part = make_part()
    part.fetch.CopyFrom(pb.Fetch(plan_json=b"{}"))
    with pytest.raises(InvalidRequest):
        await node.parts.apply(part)
    assert node.parts.statuses() == []


# ---- processes that end while they load ----


async def _lose_process(node: AgentHarness) -> None:
    """Let the process of tiny.1 appear and end while Triton loads the model."""
    node.triton.gates["tiny.1"] = asyncio.Event()
    await node.parts.apply(make_part("tiny.1"))
    await until(lambda: node.triton.loads == ["tiny.1"])
    node.processes.start("tiny.1")
    node.observe()
    node.processes.end("tiny.1")
    node.observe()


async def test_a_load_whose_process_has_ended_fails_though_triton_says_nothing(
    tmp_path: Path,
) -> None:
    async with agent_harness(tmp_path, remove_deadline_s=0.1) as node:
        await _lose_process(node)
        node.now_s[0] += 1.9
        node.observe()
        assert phases(node.parts) == [pb.STARTING], "Triton may still say why"
        node.now_s[0] += 0.2
        node.observe()
        await until(lambda: phases(node.parts) == [pb.FAILED])
        (status,) = node.parts.statuses()
        assert status.failure.message == "The process of model tiny.1 died while it loaded."
        await node.parts.remove("tiny.1", 0.1)
        await node.assert_nothing_left()


async def test_what_triton_says_about_it_in_time_is_the_reason(node: AgentHarness) -> None:
    await _lose_process(node)
    node.triton.load_errors["tiny.1"] = InvalidCheckpoint("Tensor x is missing.")
    node.triton.gates["tiny.1"].set()
    await until(lambda: phases(node.parts) == [pb.FAILED])
    (status,) = node.parts.statuses()
    assert status.failure.message == "Tensor x is missing."


async def test_a_process_that_forks_for_a_moment_has_not_died(node: AgentHarness) -> None:
    await follow(node, make_part("tiny.1"))
    (own,) = node.processes.alive
    node.processes.start("tiny.1")
    node.observe()
    node.processes.alive = {own: node.processes.alive[own]}
    node.observe()
    assert phases(node.parts) == [pb.READY]


# ---- hand-overs ----


def _hand_over(*targets: str) -> pb.HandOverRequest:
    return pb.HandOverRequest(
        replica="tiny.1",
        targets=[
            pb.HandOverTarget(replica=target, address=f"tcp://{target}:9000") for target in targets
        ],
    )


@pytest.mark.parametrize("targets", [(), ("tiny.2",), ("tiny.2", "tiny.3")])
async def test_a_head_is_told_who_takes_its_requests(
    node: AgentHarness, targets: tuple[str, ...]
) -> None:
    await follow(node, make_part("tiny.1"))
    await node.parts.hand_over(_hand_over(*targets))
    ((model, command),) = node.triton.commands
    assert model == "tiny.1"
    assert json.loads(command) == {
        "hand_over": [{"replica": target, "address": f"tcp://{target}:9000"} for target in targets]
    }


async def test_only_a_ready_head_can_be_told_to_hand_over(node: AgentHarness) -> None:
    with pytest.raises(NotFound, match=r"head of tiny\.1 is not on this node"):
        await node.parts.hand_over(_hand_over("tiny.2"))
    node.triton.gates["tiny.1"] = asyncio.Event()
    await node.parts.apply(make_part("tiny.1"))
    with pytest.raises(Unavailable, match=r"tiny\.1 is not ready"):
        await node.parts.hand_over(_hand_over("tiny.2"))
    node.triton.gates["tiny.1"].set()
    assert node.triton.commands == []


async def test_what_the_model_answers_to_a_hand_over_is_the_error(node: AgentHarness) -> None:
    await follow(node, make_part("tiny.1"))
    node.triton.command_error = InvalidRequest("no such thing")
    with pytest.raises(InvalidRequest, match="no such thing"):
        await node.parts.hand_over(_hand_over("tiny.2"))


async def test_two_replicas_of_a_deployment_live_side_by_side(
    node: AgentHarness, tmp_path: Path
) -> None:
    plan = make_plan(tmp_path / "m")
    whole = replace(plan, fetch_id="tiny.2.0")
    await follow(node, make_part("tiny.1", plan=plan, keys=True))
    await follow(node, make_part("tiny.2", plan=whole, replica="tiny.2", keys=True))
    await node.parts.remove("tiny.1")
    assert node.models_on_disk() == ["tiny.2"]
    assert [path.name for path in (node.folder / "keys").iterdir()] == ["tiny.2"]
    (kept,), used_bytes = await node.fetches.contents()
    assert kept.landed_bytes == plan.total_bytes
    assert used_bytes > 0
