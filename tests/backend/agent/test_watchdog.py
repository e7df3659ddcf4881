from __future__ import annotations

import asyncio
import os

import pytest

from paraserve_backend.agent.watchdog import Watchdog, WatchLimits
from paraserve_backend.errors import ParaServeError
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.rpc import paraserve_pb2 as pb
from tests.support.agents import AgentHarness, follow, head_part, make_part, model_files, until

INTERVAL_S = 0.5
#: Looks that make 2.5 s, without the first one that sees a pulse.
SILENT_LOOKS = 5


def make_watchdog(node: AgentHarness, *, interval_s: float = INTERVAL_S) -> Watchdog:
    return Watchdog(
        triton=node.triton,
        stubs=node.processes,
        run_files=node.run_files,
        parts=node.parts,
        slots=node.slots,
        changed=node.changed,
        limits=WatchLimits(interval_s=interval_s, silence_s=2.5),
        now_s=lambda: node.now_s[0],
    )


def beat(node: AgentHarness, model: str = "tiny.1") -> None:
    """Touch a model's pulse as its process does; every time differs from the one before."""
    path = RunDir(node.folder).pulse_file(model)
    path.parent.mkdir(exist_ok=True)
    before_ns = path.stat().st_mtime_ns if path.exists() else 0
    path.touch()
    os.utime(path, ns=(0, before_ns + 1))


async def look(node: AgentHarness, watchdog: Watchdog, *, after_s: float = INTERVAL_S) -> None:
    node.now_s[0] += after_s
    await watchdog.look()


def only_part(node: AgentHarness) -> pb.PartStatus:
    (status,) = node.parts.statuses()
    return status


def generate_part(replica: str = "tiny.1") -> pb.Part:
    files = model_files("generate", replica=replica)
    return pb.Part(replica=replica, models=[pb.ModelFiles(name=replica, files=files)])


async def serve(node: AgentHarness) -> Watchdog:
    """Have a full instance that serves and has been seen to live, and Triton too."""
    assert (await follow(node, generate_part()))[-1].phase == pb.READY
    watchdog = make_watchdog(node)
    await watchdog.ask()
    beat(node)
    await look(node, watchdog)
    return watchdog


# ---- Triton ----


async def test_tritons_coming_and_going_is_a_change_and_its_staying_is_none(
    node: AgentHarness,
) -> None:
    watchdog = make_watchdog(node)
    seen = []
    for is_up in (False, True, True, False, False):
        node.triton.is_up = is_up
        node.changed.clear()
        await watchdog.ask()
        seen.append((watchdog.triton_live, node.changed.is_set()))
    assert seen == [
        (False, True),
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    ]


async def test_two_answers_that_do_not_come_make_triton_dead_and_one_that_comes_live(
    node: AgentHarness,
) -> None:
    watchdog = make_watchdog(node)
    live = []
    for is_silent in (False, True, False, True, True, True, False):
        node.triton.is_silent = is_silent
        await look(node, watchdog)
        await watchdog.ask()
        live.append(watchdog.triton_live)
    assert live == [True, True, True, True, False, False, True]


async def test_an_answer_that_does_not_come_while_the_agent_is_late_itself_proves_nothing(
    node: AgentHarness,
) -> None:
    watchdog = make_watchdog(node)
    await look(node, watchdog)
    await watchdog.ask()
    node.triton.is_silent = True
    for _ in range(10):
        node.now_s[0] += 3 * INTERVAL_S  # no look came meanwhile
        await watchdog.ask()
        await watchdog.look()
    assert watchdog.triton_live
    for _ in range(2):
        await look(node, watchdog)
        await watchdog.ask()
    assert not watchdog.triton_live


async def test_a_stopped_triton_is_not_live_and_goes_on_when_it_is_continued(
    node: AgentHarness,
) -> None:
    watchdog = await serve(node)
    node.processes.is_server_stopped = True
    live = []
    for _ in range(3):
        await look(node, watchdog)
        live.append(watchdog.triton_live)
    assert live == [True, False, False]
    # An answer that was on its way changes nothing.
    await watchdog.ask()
    assert not watchdog.triton_live
    node.processes.is_server_stopped = False
    await look(node, watchdog)
    await watchdog.ask()
    assert watchdog.triton_live
    assert only_part(node).phase == pb.READY


async def test_a_silent_triton_delays_neither_a_look_nor_a_judgement(node: AgentHarness) -> None:
    watchdog = await serve(node)

    async def live() -> bool:
        await asyncio.Event().wait()
        return True

    node.triton.live = live  # type: ignore[method-assign]
    asking = asyncio.create_task(watchdog.ask())
    node.processes.stopped_models = {"tiny.1"}
    for _ in range(2):
        await look(node, watchdog)
    assert only_part(node).phase == pb.FAILED
    asking.cancel()
    await asyncio.wait([asking])


# ---- processes ----


async def test_it_keeps_looking_until_it_sees_a_dead_process(node: AgentHarness) -> None:
    await follow(node, make_part())
    node.changed.clear()
    watchdog = make_watchdog(node, interval_s=0.01)
    watching = asyncio.create_task(watchdog.run())
    await node.changed.wait()  # Triton came
    node.changed.clear()
    node.processes.end("tiny.1")
    await node.changed.wait()
    assert only_part(node).phase == pb.FAILED
    assert only_part(node).failure.message == "The process of model tiny.1 died."
    watching.cancel()
    await asyncio.wait([watching])


async def test_processes_that_end_with_their_triton_are_its_fault(node: AgentHarness) -> None:
    watchdog = await serve(node)
    node.triton.is_up = False  # nobody has asked it since
    node.processes.end("tiny.1")
    await look(node, watchdog)
    assert only_part(node).failure.message == "Triton stopped."


async def test_a_process_stopped_in_two_looks_in_a_row_fails_its_part_and_is_killed(
    node: AgentHarness,
) -> None:
    watchdog = await serve(node)
    node.processes.stopped_models = {"tiny.1"}
    await look(node, watchdog)
    assert (only_part(node).phase, node.processes.killed) == (pb.READY, [])
    node.changed.clear()
    await look(node, watchdog)
    assert node.changed.is_set()
    assert node.processes.killed == ["tiny.1"]
    failure = only_part(node).failure
    assert failure.grpc_code == "UNAVAILABLE"
    assert "tiny.1 has stopped answering" in failure.message


async def test_a_process_that_goes_on_after_a_short_stop_is_left_alone(node: AgentHarness) -> None:
    watchdog = await serve(node)
    for stopped in ({"tiny.1"}, set(), {"tiny.1"}, set()):
        node.processes.stopped_models = stopped
        await look(node, watchdog)
    assert (only_part(node).phase, node.processes.killed) == (pb.READY, [])


async def test_a_stopped_stage_fails_the_part_with_the_name_of_the_stage(
    node: AgentHarness,
) -> None:
    await follow(node, head_part())
    watchdog = make_watchdog(node)
    await watchdog.ask()
    node.processes.stopped_models = {"tiny.1.stage0"}
    for _ in range(2):
        await look(node, watchdog)
    assert only_part(node).failure.message == "Model tiny.1.stage0 has stopped answering."


async def test_a_process_that_is_stopped_while_it_loads_is_killed_so_that_its_start_fails(
    node: AgentHarness,
) -> None:
    gate = node.triton.gates["tiny.1"] = asyncio.Event()
    progress = await node.parts.apply(make_part())
    await until(lambda: node.triton.loads == ["tiny.1"])
    node.processes.start("tiny.1")  # Triton has started it
    watchdog = make_watchdog(node)
    await watchdog.ask()
    node.processes.stopped_models = {"tiny.1"}
    for _ in range(2):
        await look(node, watchdog)
    assert node.processes.killed == ["tiny.1"]
    node.triton.load_errors["tiny.1"] = ParaServeError("Stub process is not healthy")
    gate.set()
    assert [status async for status in progress.follow()][-1].phase == pb.FAILED


async def test_a_stopped_slot_is_replaced_and_others_processes_are_left_alone(
    node: AgentHarness,
) -> None:
    node.slots.keep(1)
    node.now_s[0] += 60
    await node.slots.tend()
    node.processes.start("somebody-elses")
    watchdog = make_watchdog(node)
    node.processes.stopped_models = {"slot-1.stage", "somebody-elses"}
    for _ in range(4):
        await look(node, watchdog)
    assert node.processes.killed == ["slot-1.stage"]
    node.processes.stopped_models = set()
    node.now_s[0] += 60
    await node.slots.tend()
    assert node.slots.idle_sets == 1
    node.processes.end("somebody-elses")


# ---- loads ----


def say_loaded(node: AgentHarness, model: str = "tiny.1") -> None:
    path = RunDir(node.folder).loaded_file(model)
    path.parent.mkdir(exist_ok=True)
    path.touch()


@pytest.mark.parametrize("is_loaded", [False, True])
async def test_a_load_that_triton_does_not_see_the_end_of_is_killed(
    node: AgentHarness, is_loaded: bool
) -> None:
    node.triton.gates["tiny.1"] = asyncio.Event()
    await node.parts.apply(make_part())
    await until(lambda: node.triton.loads == ["tiny.1"])
    node.processes.start("tiny.1")
    if is_loaded:
        say_loaded(node)
    watchdog = make_watchdog(node)
    await watchdog.ask()
    for _ in range(4):
        await look(node, watchdog)
        assert node.processes.killed == []
    for _ in range(4):
        await look(node, watchdog, after_s=3 * INTERVAL_S)  # late looks prove nothing
        assert node.processes.killed == []
    for _ in range(4):
        await look(node, watchdog)
    assert node.processes.killed == ["tiny.1"] * is_loaded
    node.triton.gates["tiny.1"].set()


async def test_a_model_that_triton_has_seen_to_load_is_left_alone(node: AgentHarness) -> None:
    await follow(node, make_part())
    say_loaded(node)
    watchdog = make_watchdog(node)
    for _ in range(20):
        await look(node, watchdog)
    assert node.processes.killed == []


async def test_what_an_earlier_process_has_loaded_says_nothing(node: AgentHarness) -> None:
    say_loaded(node)
    node.triton.gates["tiny.1"] = asyncio.Event()
    await node.parts.apply(make_part())
    await until(lambda: node.triton.loads == ["tiny.1"])
    node.processes.start("tiny.1")
    watchdog = make_watchdog(node)
    for _ in range(20):
        await look(node, watchdog)
    assert node.processes.killed == []
    node.triton.gates["tiny.1"].set()


# ---- pulses ----


async def test_a_loop_that_does_not_turn_for_the_silence_fails_its_part(node: AgentHarness) -> None:
    watchdog = await serve(node)
    phases = []
    for _ in range(SILENT_LOOKS):
        await look(node, watchdog)
        phases.append(only_part(node).phase)
    assert phases == [*[pb.READY] * (SILENT_LOOKS - 1), pb.FAILED]
    assert only_part(node).failure.message == "Model tiny.1 has stopped answering."
    assert node.processes.killed == ["tiny.1"]


async def test_a_loop_that_turns_once_in_the_silence_is_never_judged(node: AgentHarness) -> None:
    watchdog = await serve(node)
    for _ in range(5):
        for _ in range(SILENT_LOOKS - 1):
            await look(node, watchdog)
        beat(node)
        await look(node, watchdog)
    assert only_part(node).phase == pb.READY


@pytest.mark.parametrize("late", range(SILENT_LOOKS))
async def test_a_late_look_starts_the_count_again(node: AgentHarness, late: int) -> None:
    watchdog = await serve(node)
    for number in range(SILENT_LOOKS):
        await look(node, watchdog, after_s=3 * INTERVAL_S if number == late else INTERVAL_S)
        assert only_part(node).phase == pb.READY
    for _ in range(late):
        assert only_part(node).phase == pb.READY
        await look(node, watchdog)
    assert only_part(node).phase == pb.READY
    await look(node, watchdog)
    assert only_part(node).phase == pb.FAILED


async def test_on_a_machine_that_is_always_slow_nobody_is_judged(node: AgentHarness) -> None:
    watchdog = await serve(node)
    for _ in range(20):
        await look(node, watchdog, after_s=3 * INTERVAL_S)
    assert only_part(node).phase == pb.READY


async def test_the_clock_of_a_pulse_does_not_matter(node: AgentHarness) -> None:
    watchdog = await serve(node)
    path = RunDir(node.folder).pulse_file("tiny.1")
    for hour in (5, 1, 9, 0, 3, 2, 4):
        os.utime(path, (0, hour * 3600))
        await look(node, watchdog)
    assert only_part(node).phase == pb.READY


async def test_a_model_without_a_pulse_is_not_judged(node: AgentHarness) -> None:
    await follow(node, generate_part())
    watchdog = make_watchdog(node)
    for _ in range(4 * SILENT_LOOKS):
        await look(node, watchdog)
    assert only_part(node).phase == pb.READY


async def test_a_pulse_that_another_replica_left_in_a_slot_judges_nobody(
    node: AgentHarness,
) -> None:
    node.slots.keep(1)
    node.now_s[0] += 60
    await node.slots.tend()
    watchdog = make_watchdog(node)
    for replica in ("tiny.1", "tiny.2"):
        await follow(node, head_part(replica))
        beat(node, "slot-0.front")
        await look(node, watchdog)
        await node.parts.remove(replica)
        for _ in range(2 * SILENT_LOOKS):
            await look(node, watchdog)  # an idle slot has no loop
    await follow(node, head_part("tiny.3"))
    for _ in range(2 * SILENT_LOOKS):
        await look(node, watchdog)
    assert only_part(node).phase == pb.READY
    assert node.processes.killed == []


async def test_a_silent_loop_in_a_slot_fails_the_part_and_ends_the_slot(
    node: AgentHarness,
) -> None:
    node.slots.keep(1)
    node.now_s[0] += 60
    await node.slots.tend()
    await follow(node, head_part())
    beat(node, "slot-0.front")
    watchdog = make_watchdog(node)
    await watchdog.ask()
    for _ in range(SILENT_LOOKS + 1):
        await look(node, watchdog)
    assert only_part(node).failure.message == "Model tiny.1 has stopped answering."
    assert node.processes.killed == ["slot-0.front"]
    await node.parts.remove("tiny.1")
    assert not RunDir(node.folder).secret_file("slot-0.front").exists()
