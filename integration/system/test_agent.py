"""One agent beside a real tritonserver, commanded over gRPC as the scheduler does it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import numpy as np
import pytest
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient

from integration.support.agent import AgentNode, running_node, scheduler_server
from integration.support.limits import HANG_S
from integration.support.triton_server import TritonServer
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.paraserve_pb2_grpc import AgentStub
from paraserve_backend.tritonserver.host.client import ModelState, TritonClient
from paraserve_backend.tritonserver.host.repository import ModelRepository
from paraserve_backend.tritonserver.host.stubs import ProcessTable
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan
from tests.support.agents import make_plan

if TYPE_CHECKING:
    from paraserve_backend.rpc.paraserve_pb2_grpc import AgentAsyncStub

_CONFIG = """
name: "{name}"
backend: "{backend}"
max_batch_size: 0
input [{{ name: "x" data_type: TYPE_INT32 dims: [1] }}]
output [{{ name: "x" data_type: TYPE_INT32 dims: [1] }}]
instance_group [{{ kind: KIND_CPU count: 1 }}]
"""
_ENSEMBLE = """
name: "{name}"
platform: "ensemble"
input [{{ name: "x" data_type: TYPE_INT32 dims: [1] }}]
output [{{ name: "x" data_type: TYPE_INT32 dims: [1] }}]
ensemble_scheduling {{ step [{{
  model_name: "{step}" model_version: -1
  input_map {{ key: "x" value: "x" }} output_map {{ key: "x" value: "x" }}
}}] }}
"""
# A model of this backend does at load what its script says. The script is no 1/model.py: Python
# would leave bytecode beside it, and Triton reload the model for that.
_SCRIPTED = """
import runpy
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        runpy.run_path(args["model_repository"] + "/load.py")

    def execute(self, requests):
        return [
            pb_utils.InferenceResponse([pb_utils.get_input_tensor_by_name(request, "x")])
            for request in requests
        ]
"""
# Never ends a request: what a hung engine does.
_HANGING = """
import pathlib

class TritonPythonModel:
    def initialize(self, args):
        self.busy = pathlib.Path(args["model_repository"], "busy")
        self.senders = []

    def execute(self, requests):
        self.senders += [request.get_response_sender() for request in requests]
        self.busy.touch()
"""


def scripted_model(name: str, script: str = "") -> pb.ModelFiles:
    code = "import pathlib, time\n" + textwrap.dedent(script)
    config = _CONFIG.format(name=name, backend="scripted")
    files = {"config.pbtxt": config.encode(), "load.py": code.encode(), "1/none": b""}
    return pb.ModelFiles(name=name, files=files)


def hanging_model(name: str) -> pb.ModelFiles:
    config = _CONFIG.format(name=name, backend="hanging")
    config += "model_transaction_policy { decoupled: true }"
    return pb.ModelFiles(name=name, files={"config.pbtxt": config.encode(), "1/none": b""})


def ensemble(name: str, step: str) -> pb.ModelFiles:
    files = {"config.pbtxt": _ENSEMBLE.format(name=name, step=step).encode(), "1/none": b""}
    return pb.ModelFiles(name=name, files=files, load_wave=1)


def make_part(*models: pb.ModelFiles, plan: FetchPlan | None = None) -> pb.Part:
    return pb.Part(
        deployment="tiny",
        replica="tiny.1",
        models=models or [scripted_model("tiny.1")],
        fetch=pb.Fetch(plan_json=plan.to_json()) if plan else None,
    )


@pytest.fixture
def triton(tmp_path: Path) -> Iterator[TritonServer]:
    with TritonServer(tmp_path / "triton") as server:
        server.add_backend("scripted", _SCRIPTED)
        server.add_backend("hanging", _HANGING)
        yield server


@pytest.fixture
async def node(triton: TritonServer, tmp_path: Path) -> AsyncIterator[AgentNode]:
    async with running_node(triton, tmp_path) as node:
        yield node


def has_phase(phase: pb.Phase.ValueType) -> Callable[[pb.NodeStatus], bool]:
    return lambda status: [part.phase for part in status.parts] == [phase]


async def until_exists(path: Path) -> None:
    while not path.exists():
        await asyncio.sleep(0.02)


_READ_WEIGHTS = """
from paraserve_backend.weights.tiers.reader import TierReader
from paraserve_backend.telemetry.spans import SpanFile, SpanName
tier = pathlib.Path({tier!r})
with SpanFile(tier / "fetches" / "tiny.1.0" / "spans.jsonl").span(SpanName.ADOPT_WEIGHTS):
    TierReader.open(tier, "tiny.1.0")
"""


async def test_a_part_becomes_ready_and_is_removed_without_a_trace(
    node: AgentNode, tmp_path: Path
) -> None:
    plan = make_plan(tmp_path / "model")
    read_weights = _READ_WEIGHTS.format(tier=str(node.config.run_dir / "tier"))
    stage, forward = "tiny.1.stage0", "tiny.1.forward"
    part = make_part(ensemble(forward, stage), scripted_model(stage, read_weights), plan=plan)
    part.channel_keys.CopyFrom(pb.ChannelKeys(public_key="p" * 40, secret_key="s" * 40))

    statuses = await node.apply(part)

    last = statuses[-1]
    assert [status.phase for status in statuses] == [pb.STARTING] * (len(statuses) - 1) + [
        pb.READY
    ], last
    assert last.fetched_bytes == last.total_bytes == plan.total_bytes
    spans = {span.name: span for span in last.spans}
    loads = {f"load {stage}", f"load {forward}"}
    assert spans.keys() == {"fetch", "write models", "adopt weights"} | loads
    assert all(0 < span.start_s <= span.end_s for span in last.spans)
    assert spans["fetch"].bytes == plan.total_bytes
    assert spans[f"load {stage}"].end_s <= spans[f"load {forward}"].start_s
    key_file = node.config.run_dir / "keys" / "tiny.1" / "curve.key"
    assert key_file.read_text().split() == ["p" * 40, "s" * 40]
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert key_file.parent.stat().st_mode & 0o777 == 0o700
    assert (await node.triton.states())[forward] is ModelState.READY
    assert [stub.model for stub in node.processes()] == [stage]
    assert (await node.describe()).tier[0].landed_bytes > 0

    assert await node.remove() is True
    await node.assert_nothing_left()
    assert await node.triton.states() == {}
    assert await node.remove() is False


async def test_a_model_that_fails_to_load_ends_the_part_with_its_own_sentence(
    node: AgentNode, tmp_path: Path
) -> None:
    fail = """
        from paraserve_backend.errors import InvalidCheckpoint
        raise InvalidCheckpoint("Tensor x is missing: replace the file.")
    """
    part = make_part(
        scripted_model("tiny.1"),
        scripted_model("tiny.1.link", fail),
        plan=make_plan(tmp_path / "model"),
    )
    last = (await node.apply(part))[-1]
    assert last.phase == pb.FAILED
    assert last.failure.message == "Tensor x is missing: replace the file."
    assert last.failure.grpc_code == "INVALID_ARGUMENT"
    again = await node.apply(part)
    assert [status.failure for status in again] == [last.failure]
    assert await node.remove() is True
    await node.assert_nothing_left()


async def test_a_source_that_is_gone_ends_the_part_even_while_a_model_waits_for_its_bytes(
    node: AgentNode, tmp_path: Path
) -> None:
    wait = """
        from paraserve_backend.weights.tiers.reader import TierReader
        reader = TierReader.open(pathlib.Path({tier!r}), "tiny.1.0")
        reader.wait_for("model.norm.weight", timeout_s=600)
    """
    plan = make_plan(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    model = scripted_model("tiny.1", wait.format(tier=str(node.config.run_dir / "tier")))
    last = (await node.apply(make_part(model, plan=plan)))[-1]
    assert (last.phase, last.failure.grpc_code) == (pb.FAILED, "NOT_FOUND")
    assert "no longer" in last.failure.message
    await node.remove()
    await node.assert_nothing_left()


async def test_a_killed_process_is_news_by_itself_and_apply_heals_after_remove(
    triton: TritonServer, tmp_path: Path
) -> None:
    # The next heartbeat is due in an hour.
    async with running_node(triton, tmp_path, heartbeat_interval_s=3600) as node:
        await node.apply(make_part())
        [stub] = node.processes()
        os.kill(stub.pid, signal.SIGKILL)
        status = await node.scheduler.until(has_phase(pb.FAILED))
        assert status.parts[0].failure.message == "The process of model tiny.1 died."
        assert status.parts[0].failure.grpc_code == "UNAVAILABLE"
        assert await node.remove() is True
        await node.assert_nothing_left()
        assert (await node.apply(make_part()))[-1].phase == pb.READY
        assert [new.pid for new in node.processes()] != [stub.pid]


async def test_applying_a_part_twice_at_once_loads_it_once(node: AgentNode, tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    note = f"""
        with open({str(loads)!r}, "a") as file:
            file.write("loaded ")
    """
    part = make_part(scripted_model("tiny.1", note))
    first, second = await asyncio.gather(node.apply(part), node.apply(part))
    third = await node.apply(part)
    assert {first[-1].phase, second[-1].phase, third[-1].phase} == {pb.READY}
    assert len(third) == 1
    assert loads.read_text() == "loaded "


def waiting_model(started: Path, gate: Path) -> pb.ModelFiles:
    """Return a model whose load is under way once `started` is there, and ends with `gate`."""
    return scripted_model(
        "tiny.1",
        f"""
        pathlib.Path({str(started)!r}).touch()
        while not pathlib.Path({str(gate)!r}).exists():
            time.sleep(0.01)
        """,
    )


async def test_a_removal_during_the_load_waits_for_it_and_then_leaves_nothing(
    node: AgentNode, tmp_path: Path
) -> None:
    started, gate = tmp_path / "started", tmp_path / "gate"
    part = make_part(waiting_model(started, gate), plan=make_plan(tmp_path / "model"))
    applying = asyncio.create_task(node.apply(part))
    await until_exists(started)
    removing = asyncio.create_task(node.remove(deadline_s=HANG_S))
    await node.scheduler.until(has_phase(pb.STOPPING))
    assert not removing.done()
    gate.touch()
    assert await removing is True
    assert (await applying)[-1].phase == pb.STOPPED
    await node.assert_nothing_left()


async def test_a_load_that_never_ends_is_killed_at_the_deadline(
    node: AgentNode, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    part = make_part(waiting_model(started, tmp_path / "never"))
    applying = asyncio.create_task(node.apply(part))
    await until_exists(started)
    assert await node.remove(deadline_s=0.3) is True
    await applying
    await node.assert_nothing_left()


@asynccontextmanager
async def hanging_request(node: AgentNode) -> AsyncIterator[None]:
    """Have model `tiny.1` work on a request for as long as the block runs."""

    async def requests() -> AsyncIterator[dict[str, object]]:
        data = InferInput("x", [1], "INT32").set_data_from_numpy(np.zeros(1, dtype=np.int32))
        yield {"model_name": "tiny.1", "inputs": [data]}
        await asyncio.Event().wait()

    async with InferenceServerClient(node.server.grpc_address) as client:
        answers = client.stream_infer(requests())
        waiting = asyncio.ensure_future(anext(aiter(answers)))
        await until_exists(node.config.model_repository / "tiny.1" / "busy")
        yield
        waiting.cancel()
        await asyncio.wait([waiting])


@pytest.mark.parametrize("is_killed", [False, True])
async def test_a_request_that_never_ends_cannot_hold_up_a_removal(
    node: AgentNode, is_killed: bool
) -> None:
    await node.apply(make_part(hanging_model("tiny.1")))
    [stub] = node.processes()
    async with hanging_request(node):
        if is_killed:
            os.kill(stub.pid, signal.SIGKILL)
        # Nobody waits for the requests of a dead process: an hour would be too long for the test.
        assert await node.remove(deadline_s=3600 if is_killed else 1) is True
        node.assert_no_traces()


async def test_a_part_that_is_not_ready_in_time_fails_and_goes(
    node: AgentNode, tmp_path: Path
) -> None:
    started, gate = tmp_path / "started", tmp_path / "gate"
    part = make_part(waiting_model(started, gate), plan=make_plan(tmp_path / "model"))
    part.fetch.deadline_s = 0.5
    last = (await node.apply(part))[-1]
    assert last.failure.message == "Stage 0 of tiny.1 was not ready within 0.5 s."
    assert last.failure.grpc_code == "DEADLINE_EXCEEDED"
    gate.touch()
    await node.remove()
    await node.assert_nothing_left()


async def test_a_lost_triton_is_reported_and_serves_again_once_it_is_back(
    node: AgentNode, triton: TritonServer
) -> None:
    await node.apply(make_part())
    await node.scheduler.until(lambda status: status.triton_live)
    await asyncio.to_thread(triton.stop)
    status = await node.scheduler.until(lambda status: not status.triton_live)
    failed = status if has_phase(pb.FAILED)(status) else None
    failed = failed or await node.scheduler.until(has_phase(pb.FAILED))
    assert failed.parts[0].failure.grpc_code == "UNAVAILABLE"
    assert await node.remove() is True
    node.assert_no_traces()
    await asyncio.to_thread(triton.start)
    await node.scheduler.until(lambda status: status.triton_live)
    assert (await node.apply(make_part()))[-1].phase == pb.READY


async def test_a_stopped_process_fails_its_part_and_the_next_start_serves(
    triton: TritonServer, tmp_path: Path
) -> None:
    # The next heartbeat is due in an hour.
    async with running_node(triton, tmp_path, heartbeat_interval_s=3600) as node:
        await node.apply(make_part())
        [stub] = node.processes()
        os.kill(stub.pid, signal.SIGSTOP)
        status = await node.scheduler.until(has_phase(pb.FAILED))
        assert status.parts[0].failure.message == "Model tiny.1 has stopped answering."
        assert status.parts[0].failure.grpc_code == "UNAVAILABLE"
        assert await node.remove() is True
        await node.assert_nothing_left()
        assert (await node.apply(make_part()))[-1].phase == pb.READY


async def test_a_request_on_a_stopped_process_does_not_hold_up_its_removal(
    node: AgentNode,
) -> None:
    await node.apply(make_part(hanging_model("tiny.1")))
    [stub] = node.processes()
    async with hanging_request(node):
        os.kill(stub.pid, signal.SIGSTOP)
        await node.scheduler.until(has_phase(pb.FAILED))
        # An hour would be too long for the test.
        assert await node.remove(deadline_s=3600) is True
        node.assert_no_traces()


async def test_a_loop_that_turns_no_more_fails_its_part_though_its_process_runs(
    node: AgentNode, tmp_path: Path
) -> None:
    pulse, gate = node.config.run_dir / "pulses" / "tiny.1", tmp_path / "gate"
    beat = f"""
        import threading
        def turn():
            while not pathlib.Path({str(gate)!r}).exists():
                pulse.touch()
                time.sleep(0.1)
        pulse = pathlib.Path({str(pulse)!r})
        pulse.parent.mkdir(exist_ok=True)
        threading.Thread(target=turn, daemon=True).start()
    """
    await node.apply(make_part(scripted_model("tiny.1", beat)))
    await until_exists(pulse)
    assert has_phase(pb.READY)(await node.scheduler.until(lambda _: True))
    gate.touch()
    status = await node.scheduler.until(has_phase(pb.FAILED))
    assert status.parts[0].failure.message == "Model tiny.1 has stopped answering."
    assert await node.remove() is True
    await node.assert_nothing_left()
    assert not pulse.exists()


async def test_a_process_that_is_stopped_while_it_loads_fails_its_start(
    node: AgentNode, tmp_path: Path
) -> None:
    started, gate = tmp_path / "started", tmp_path / "gate"
    applying = asyncio.create_task(node.apply(make_part(waiting_model(started, gate))))
    await until_exists(started)
    [stub] = node.processes()
    os.kill(stub.pid, signal.SIGSTOP)
    last = (await applying)[-1]
    assert last.failure.message == "The process of model tiny.1 died while it loaded."
    await node.remove()
    await node.assert_nothing_left()


async def test_a_load_whose_end_triton_misses_fails_instead_of_lasting_for_ever(
    triton: TritonServer, tmp_path: Path
) -> None:
    """Triton 2.51 gives up a process that pauses while it loads, but not its load."""
    started, gate = tmp_path / "started", tmp_path / "gate"
    # So slow that nobody sees the process stopped twice.
    async with running_node(triton, tmp_path, watch_interval_s=5.0, silence_s=5.0) as node:
        loaded = node.config.run_dir / "loaded" / "tiny.1"
        model = scripted_model(
            "tiny.1",
            f"""
            pathlib.Path({str(started)!r}).touch()
            while not pathlib.Path({str(gate)!r}).exists():
                time.sleep(0.01)
            loaded = pathlib.Path({str(loaded)!r})
            loaded.parent.mkdir(exist_ok=True)
            loaded.touch()
            """,
        )
        applying = asyncio.create_task(node.apply(make_part(model)))
        await until_exists(started)
        [stub] = node.processes()
        os.kill(stub.pid, signal.SIGSTOP)
        await asyncio.sleep(3)  # the fault: what Triton does meanwhile, nobody can see
        os.kill(stub.pid, signal.SIGCONT)
        gate.touch()
        last = (await applying)[-1]
        assert last.failure.message == "The process of model tiny.1 died while it loaded."
        await node.remove()
        await node.assert_nothing_left()


async def test_a_stopped_triton_is_not_live(node: AgentNode, triton: TritonServer) -> None:
    await node.apply(make_part())
    await node.scheduler.until(lambda status: status.triton_live)
    os.kill(triton.pid, signal.SIGSTOP)
    try:
        await node.scheduler.until(lambda status: not status.triton_live)
        assert await node.remove(deadline_s=0.5) is True
        assert node.processes() == ()
    finally:
        os.kill(triton.pid, signal.SIGKILL)


async def test_a_stopped_triton_without_models_is_not_live(
    node: AgentNode, triton: TritonServer
) -> None:
    await node.scheduler.until(lambda status: status.triton_live)
    os.kill(triton.pid, signal.SIGSTOP)
    await node.scheduler.until(lambda status: not status.triton_live)
    os.kill(triton.pid, signal.SIGCONT)
    await node.scheduler.until(lambda status: status.triton_live)


async def test_a_wrong_request_is_refused_with_a_sentence(node: AgentNode) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await node.apply(make_part(scripted_model("other")))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "Model other does not belong to tiny.1."
    assert list((await node.describe()).parts) == []


async def test_an_agent_starts_by_removing_what_an_earlier_one_left(
    triton: TritonServer, tmp_path: Path
) -> None:
    client = TritonClient(triton.grpc_address)
    for model in (scripted_model("tiny.1"), ensemble("tiny.1.forward", "tiny.1")):
        ModelRepository(triton.model_repository).write(model.name, model.files)
        await client.load(model.name)
    await client.close()
    (triton.model_repository / "theirs").mkdir()
    (tmp_path / "run" / "keys" / "tiny.0").mkdir(parents=True)
    async with running_node(triton, tmp_path) as node:
        assert await node.triton.states() == {"theirs": ModelState.ABSENT}
        assert node.processes() == ()
        assert not (node.config.run_dir / "keys" / "tiny.0").exists()
        (triton.model_repository / "theirs").rmdir()


async def test_an_agent_that_stops_takes_everything_with_it(
    triton: TritonServer, tmp_path: Path
) -> None:
    async with running_node(triton, tmp_path) as node:
        await node.apply(make_part(plan=make_plan(tmp_path / "model")))
    node.assert_no_traces()
    assert not node.config.run_dir.exists()


async def test_the_process_stops_cleanly_on_sigterm(triton: TritonServer, tmp_path: Path) -> None:
    config = tmp_path / "agent.yaml"
    async with scheduler_server() as (scheduler, address):
        config.write_text(
            f"name: node-1\nscheduler: {address}\ntriton: {triton.grpc_address}\n"
            f"model_repository: {triton.model_repository}\nlisten: 127.0.0.1:0\n"
        )
        command = ("-m", "paraserve_backend.agent.main", f"--config={config}")
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, f"--run-dir={tmp_path / 'run'}", stderr=subprocess.PIPE
        )
        info = await scheduler.info.get()
        async with grpc.aio.insecure_channel(info.agent_address) as channel:
            stub: AgentAsyncStub = AgentStub(channel)
            phases = [status.phase async for status in stub.Apply(make_part())]
        assert phases[-1] == pb.READY
        process.send_signal(signal.SIGTERM)
        await process.communicate()
    assert process.returncode == 0
    assert ProcessTable(triton.model_repository).find() == ()
    assert list(triton.model_repository.iterdir()) == []
    assert not (tmp_path / "run").exists()


async def test_a_restricted_repository_api_needs_its_key(tmp_path: Path) -> None:
    restriction = "--grpc-restricted-protocol=model-repository:agent-key=SECRET"
    with TritonServer(tmp_path / "triton", [restriction]) as server:
        without = TritonClient(server.grpc_address)
        with pytest.raises(InvalidRequest, match="set triton_key_file") as caught:
            await without.states()
        assert "SECRET" not in str(caught.value)
        with pytest.raises(InvalidRequest, match="set triton_key_file"):
            await without.load("tiny.1")
        with_key = TritonClient(server.grpc_address, key="agent-key=SECRET")
        assert await with_key.states() == {}
        await with_key.unload("tiny.1")
        await without.close()
        await with_key.close()
