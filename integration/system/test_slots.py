"""Processes that wait without weights become one deployment's models after the other's."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from integration.support.agent import AgentNode, running_node
from integration.support.tiny_cluster import (
    Stream,
    TinyCluster,
    assert_nothing_left,
    generate,
    prompts,
    stubs,
    wait_until,
)
from integration.support.triton_server import TritonServer
from paraserve_backend.errors import InvalidRequest, NotFound
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.auth import metadata
from paraserve_backend.rpc.paraserve_pb2_grpc import AgentStub
from paraserve_backend.tritonserver.host.client import TritonClient
from paraserve_backend.tritonserver.host.model_config import places, slot_files
from paraserve_backend.tritonserver.host.repository import ModelRepository
from paraserve_backend.tritonserver.host.stubs import ProcessTable

FIRST, SECOND = "llama-sharded", "qwen3-odd"
PROMPT = prompts(1)[0]


class Agents:
    """The cluster's agents, called directly."""

    def __init__(self, cluster: TinyCluster) -> None:
        token = cluster.layout.files.token.read_text(encoding="utf-8")
        self._metadata = metadata(token)
        self._channels = {
            node.name: grpc.insecure_channel(f"{node.host}:{node.agent_port}")
            for node in cluster.layout.nodes
        }

    def status(self, node: str) -> pb.NodeStatus:
        stub = AgentStub(self._channels[node])
        return stub.Describe(pb.DescribeRequest(), metadata=self._metadata)

    def keep(self, idle_slots: int) -> None:
        """Have every node keep so many idle sets, and wait until they do."""
        request = pb.KeepSlotsRequest(idle_slots=idle_slots)
        for channel in self._channels.values():
            AgentStub(channel).KeepSlots(request, metadata=self._metadata)
        self.wait(lambda status: status.idle_slots == idle_slots)

    def wait(self, condition: Callable[[pb.NodeStatus], bool]) -> None:
        wait_until(lambda: all(condition(self.status(node)) for node in self._channels))

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()


@pytest.fixture
def agents(slots_cluster: TinyCluster) -> Iterator[Agents]:
    agents = Agents(slots_cluster)
    agents.keep(1)
    yield agents
    agents.close()


def start(cluster: TinyCluster, name: str, model: str, stages: int = 2) -> pb.ReplicaStatus:
    """Start a deployment by a request, whose answer must be the model's."""
    cluster.deploy(name, model, stages)
    assert generate(cluster, name, PROMPT, 8) == cluster.models[model].greedy(PROMPT, 8)
    return cluster.replica(name)


def slots_of(replica: pb.ReplicaStatus) -> dict[str, str]:
    return {model: slot for part in replica.parts for model, slot in part.status.slots.items()}


def remove(cluster: TinyCluster, name: str) -> None:
    cluster.client.delete(name)
    wait_until(lambda: all(it.spec.name != name for it in cluster.client.status().deployments))


def test_two_deployments_in_turn_run_in_the_same_processes(
    slots_cluster: TinyCluster, agents: Agents
) -> None:
    def run(name: str, model: str) -> dict[str, list[int]]:
        replica = start(slots_cluster, name, model)
        slots = slots_of(replica)
        kinds = [f"{name}.1", f"{name}.1.link", f"{name}.1.stage0", f"{name}.1.stage1"]
        assert sorted(slots) == kinds
        pids = {slot: stubs(slot) for slot in slots.values()}
        remove(slots_cluster, name)
        agents.wait(lambda status: status.idle_slots == 1)
        return pids

    first = run("one", FIRST)
    second = run("two", SECOND)
    # Each node has its own; the second node's front and link were not needed.
    assert [len(pids) for pids in first.values()] == [2, 2, 2]
    assert first == second


def process_of(cluster: TinyCluster, node: str, slot: str) -> int:
    found = ProcessTable(cluster.layout.files.model_repository(node)).find()
    return next(stub.pid for stub in found if stub.model == slot)


def test_a_killed_idle_slot_is_replaced(slots_cluster: TinyCluster, agents: Agents) -> None:
    # Also those that came while another part had theirs are gone.
    wait_until(lambda: len(slots_on(slots_cluster, "node1")) == 3)
    before = slots_on(slots_cluster, "node1")
    victim = next(slot for slot in before if slot.endswith(".stage"))
    os.kill(process_of(slots_cluster, "node1", victim), signal.SIGKILL)
    wait_until(lambda: agents.status("node1").idle_slots == 0)
    agents.wait(lambda status: status.idle_slots == 1)
    now = slots_on(slots_cluster, "node1")
    assert before - now == {victim}
    assert len(now) == 3
    start(slots_cluster, "after", FIRST)
    remove(slots_cluster, "after")


def slots_on(cluster: TinyCluster, node: str) -> set[str]:
    found = ProcessTable(cluster.layout.files.model_repository(node)).find()
    return {stub.model for stub in found}


@pytest.mark.parametrize("victim", ["", ".stage1"])
def test_requests_of_a_killed_bound_slot_go_on_at_another_replica(
    slots_cluster: TinyCluster, agents: Agents, victim: str
) -> None:
    name = f"killed{victim.replace('.', '-')}"
    slots_cluster.deploy(name, FIRST, 2)
    expected = slots_cluster.models[FIRST].greedy(PROMPT, 120)
    generate(slots_cluster, name, PROMPT, 1)
    # Found before the request runs: it must not end while we look.
    replica = slots_cluster.replica(name)
    part = replica.parts[1 if victim else 0]
    process = process_of(slots_cluster, part.node, part.status.slots[f"{replica.replica}{victim}"])
    stream = Stream(slots_cluster, name, PROMPT, 120)
    begun = stream.next().token_ids
    os.kill(process, signal.SIGKILL)
    assert begun + stream.all_ids() == expected
    assert slots_cluster.replica(name).replica != replica.replica
    remove(slots_cluster, name)
    agents.wait(lambda status: status.idle_slots == 1)


def test_without_slots_left_a_model_is_loaded(slots_cluster: TinyCluster, agents: Agents) -> None:
    bound = start(slots_cluster, "bound", FIRST, 1)
    assert slots_of(bound).keys() == {"bound.1"}
    agents.keep(0)
    loaded = start(slots_cluster, "loaded", SECOND)
    assert slots_of(loaded) == {}
    assert generate(slots_cluster, "bound", PROMPT, 8) == (
        slots_cluster.models[FIRST].greedy(PROMPT, 8)
    )
    for name in ("bound", "loaded"):
        remove(slots_cluster, name)
        assert_nothing_left(slots_cluster, f"{name}.1")


async def leave_slots(server: TritonServer, run_dir: Path) -> None:
    """Load one of every kind, as an agent that was killed leaves them behind."""
    client = TritonClient(server.grpc_address)
    for number, place in enumerate(places(["cpu"])):
        files = slot_files(f"slot-{number}.{place.kind}", place, str(run_dir))
        ModelRepository(server.model_repository).write(f"slot-{number}.{place.kind}", files)
        await client.load(f"slot-{number}.{place.kind}")
    await client.close()


async def test_an_agent_removes_slots_of_an_earlier_one_and_takes_its_own_with_it(
    tmp_path: Path,
) -> None:
    with TritonServer(tmp_path / "triton") as server:
        await leave_slots(server, tmp_path / "run")
        async with running_node(server, tmp_path) as node:
            assert node.processes() == ()
            await node.agent.KeepSlots(pb.KeepSlotsRequest(idle_slots=5))
            status = await node.scheduler.until(lambda status: status.idle_slots > 0)
            assert status.idle_slots == 1  # the node's setting
            assert status.slots_bytes > 100_000_000  # torch, twice
            assert len(node.processes()) == 3
            await refuses_what_its_agent_did_not_mean(node)
        assert ProcessTable(server.model_repository).find() == ()
        assert server.shm_regions() == []
        assert list(server.model_repository.iterdir()) == []


async def refuses_what_its_agent_did_not_mean(node: AgentNode) -> None:
    slots = {stub.model.partition(".")[2]: stub.model for stub in node.processes()}
    elsewhere = {
        "role": "generate",
        "replica": "d.1",
        "run_dir": "/dev/shm/elsewhere",
        "fetch_id": "d.1.0",
        "key_file": f"{node.config.run_dir}/keys/d.1/curve.key",
    }
    with pytest.raises(InvalidRequest, match="weights in its own run_dir"):
        await obey(node, slots["front"], {"bind": elsewhere})
    for slot in slots.values():
        with pytest.raises(NotFound, match=r"Replica d\.1 is not here"):
            await node.triton.command(slot, "{}", secret=secret_of(node, slot), replica="d.1")
        await obey(node, slot, {"unbind": True})  # idle is no error


async def obey(node: AgentNode, slot: str, command: dict[str, object]) -> None:
    """Command a slot as its agent does."""
    await node.triton.command(slot, json.dumps(command), secret=secret_of(node, slot))


def secret_of(node: AgentNode, slot: str) -> str:
    return RunDir(node.config.run_dir).secret_file(slot).read_text()


def command_over_grpc(cluster: TinyCluster, deployment: str, command: str) -> None:
    ids = triton.InferInput("input_ids", [len(PROMPT)], "INT32")
    ids.set_data_from_numpy(np.array(PROMPT, np.int32))
    with closing(triton.InferenceServerClient(cluster.layout.gateway_address)) as client:
        client.infer(deployment, [ids], parameters={"command": command})


def test_no_client_commands_a_slot(slots_cluster: TinyCluster, agents: Agents) -> None:
    """The attack: unbind what serves another tenant, or bind it as that tenant's neighbour."""
    assert slots_of(start(slots_cluster, "victim", FIRST, stages=1))
    assert slots_of(start(slots_cluster, "secret", SECOND, stages=1))
    layout = slots_cluster.layout
    bind = {
        "role": "generate",
        "replica": "victim.1",
        "run_dir": str(layout.files.run_dir(layout.nodes[0].name)),
        "fetch_id": "secret.1.0",
        "kv_blocks": "64",
    }
    commands = [{"unbind": True}, {"bind": bind}, {"hand_over": []}]
    try:
        for text in map(json.dumps, commands):
            with pytest.raises(InferenceServerException, match="'command'"):
                command_over_grpc(slots_cluster, "victim", text)
            body = json.dumps({"text_input": "x", "command": text}).encode()
            url = f"http://{layout.host}:{layout.gateway_http_port}/v2/models/victim/generate"
            with pytest.raises(urllib.error.HTTPError, match="400"):
                urllib.request.urlopen(url, body)
        expected = slots_cluster.models[FIRST].greedy(PROMPT, 8)
        assert generate(slots_cluster, "victim", PROMPT, 8) == expected
    finally:
        remove(slots_cluster, "victim")
        remove(slots_cluster, "secret")


def test_a_pipeline_in_slots_hands_its_request_over_to_a_full_instance(
    slots_cluster: TinyCluster, agents: Agents
) -> None:
    name = "moved"
    slots_cluster.client.deploy(
        pb.DeploymentSpec(
            name=name, source=slots_cluster.sources[FIRST], max_stages=2, max_context=256
        )
    )
    slots_cluster.until_known(name)
    expected = slots_cluster.models[FIRST].greedy(PROMPT, 160)
    stream = Stream(slots_cluster, name, PROMPT, 160)
    begun = stream.next().token_ids
    pipeline = slots_cluster.client.status(name).deployments[0].replicas[0]
    assert len(slots_of(pipeline)) == 4
    assert begun + stream.all_ids() == expected

    def has_moved() -> bool:
        """Keep it busy: only a pipeline that is of use is consolidated."""
        assert Stream(slots_cluster, name, PROMPT, 160).all_ids() == expected
        return slots_cluster.client.status(name).deployments[0].replicas[0].removed_s > 0

    wait_until(has_moved)
    full = slots_cluster.replica(name)
    assert (full.succeeds, len(full.parts)) == (pipeline.replica, 1)
    # What answers now is not what was in those processes before.
    assert generate(slots_cluster, name, PROMPT, 8) == (
        slots_cluster.models[FIRST].greedy(PROMPT, 8)
    )
    remove(slots_cluster, name)
    agents.wait(lambda status: status.idle_slots == 1)
