"""Processes that wait without weights become one deployment's models after the other's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc
import pytest

from integration.tiny_cluster import Cluster, generate, prompts, stubs, wait_until
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.auth import metadata
from paraserve_backend.rpc.paraserve_pb2_grpc import AgentStub

FIRST, SECOND = "llama-sharded", "qwen3-odd"
PROMPT = prompts(1)[0]


class Agents:
    """The cluster's agents, called directly."""

    def __init__(self, cluster: Cluster) -> None:
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
def agents(slots_cluster: Cluster) -> Iterator[Agents]:
    agents = Agents(slots_cluster)
    agents.keep(1)
    yield agents
    agents.keep(0)
    agents.close()


def start(cluster: Cluster, name: str, model: str, stages: int = 2) -> pb.ReplicaStatus:
    """Start a deployment by a request, whose answer must be the model's."""
    cluster.deploy(name, model, stages)
    assert generate(cluster, name, PROMPT, 8) == cluster.models[model].greedy(PROMPT, 8)
    return cluster.replica(name)


def slots_of(replica: pb.ReplicaStatus) -> dict[str, str]:
    return {model: slot for part in replica.parts for model, slot in part.status.slots.items()}


def remove(cluster: Cluster, name: str) -> None:
    cluster.client.delete(name)
    wait_until(lambda: all(it.spec.name != name for it in cluster.client.status().deployments))


def test_two_deployments_in_turn_run_in_the_same_processes(
    slots_cluster: Cluster, agents: Agents
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
