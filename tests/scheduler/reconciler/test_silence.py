"""Replicas of which a gateway says that they send neither tokens nor answers to probes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.control_plane.messages.gateways import demand
from paraserve_scheduler.state.actions import FailDeployment, StartReplica
from tests.support.histories import History
from tests.support.scheduler_records import (
    make_deployment,
    make_node_info,
    make_state,
)


def history_of(*nodes: str, **spec: Any) -> History:
    infos = [make_node_info(name) for name in nodes]
    return History(nodes=infos, deployments=[make_state(make_deployment(max_stages=1, **spec))])


def two_replicas() -> History:
    history = history_of("n0", "n1", min_replicas=2, max_replicas=2)
    history.decides()
    for replica in history.view.live_replicas():
        history.becomes_ready(replica.id)
    assert history.routed() == ["tiny.1", "tiny.2"]
    return history


def silent(history: History, *replicas: str, gateway: str = "g0", **fields: Any) -> None:
    history.demand(gateway=gateway, silent=frozenset(replicas), **fields)


def starts(history: History) -> list[str]:
    actions = history.decides()
    return [action.plan.replica for action in actions if isinstance(action, StartReplica)]


def test_a_gateways_report_names_who_is_silent() -> None:
    entries = [
        pb.ReplicaDemand(replica="tiny.1", in_flight=1, is_silent=True),
        pb.ReplicaDemand(replica="tiny.2", in_flight=1),
    ]
    read = demand(pb.Demand(deployment="tiny", replicas=entries))
    assert read.silent == {"tiny.1"}
    assert read.replica_in_flight == {"tiny.1": 1, "tiny.2": 1}


def test_a_silent_replica_gets_no_new_requests_while_another_one_serves() -> None:
    history = two_replicas()
    silent(history, "tiny.1")
    assert history.routed() == ["tiny.2"]
    silent(history, "tiny.1", gateway="g1")
    silent(history)
    assert history.routed() == ["tiny.2"], "g1 says so still"
    silent(history, gateway="g1")
    assert history.routed() == ["tiny.1", "tiny.2"]


def test_where_all_are_silent_all_are_routed() -> None:
    history = two_replicas()
    silent(history, "tiny.1", "tiny.2")
    assert history.routed() == ["tiny.1", "tiny.2"]


def test_a_gateway_that_is_gone_blames_nobody_for_ever() -> None:
    history = two_replicas()
    silent(history, "tiny.1", gateway="gone")
    silent(history)
    assert history.routed() == ["tiny.2"]
    history.passes(6, silent=["gone"])
    assert history.routed() == ["tiny.1", "tiny.2"]


def test_instead_of_the_only_replica_that_is_silent_another_one_starts() -> None:
    history = history_of("n0", "n1", max_replicas=1)
    history.serves()
    stuck: dict[str, Any] = {"in_flight": 1, "replica_in_flight": {"tiny.1": 1}}
    history.demand(**stuck)
    assert starts(history) == []
    silent(history, "tiny.1", **stuck)
    assert starts(history) == ["tiny.2"]
    assert starts(history) == [], "one is enough"
    assert history.view.replicas["tiny.1"].is_wanted, "its agent judges, no gateway"
    history.becomes_ready("tiny.2")
    assert history.routed() == ["tiny.2"]


def test_requests_that_are_held_because_of_a_silent_replica_start_another_one() -> None:
    history = history_of("n0", "n1", max_replicas=1)
    history.serves()
    silent(history, "tiny.1", waiting=1)
    assert starts(history) == ["tiny.2"]


def test_an_idle_replica_that_is_silent_is_no_reason_to_start_another_one() -> None:
    history = history_of("n0", "n1", max_replicas=1)
    history.serves()
    silent(history, "tiny.1")
    assert starts(history) == []


def test_a_silent_replica_beside_one_that_serves_is_replaced_where_that_one_is_full() -> None:
    history = two_replicas()
    load = {"tiny.1": 1, "tiny.2": 4}
    history.demand(in_flight=5, replica_in_flight=load, waiting=0)
    assert starts(history) == []
    nodes = history_of("n0", "n1", "n2", min_replicas=2, max_replicas=2)
    nodes.decides()
    for replica in nodes.view.live_replicas():
        nodes.becomes_ready(replica.id)
    silent(nodes, "tiny.1", in_flight=5, replica_in_flight=load)
    assert starts(nodes) == ["tiny.3"]


def test_when_nobody_says_so_any_more_it_is_capacity_again() -> None:
    history = history_of("n0", "n1", max_replicas=1)
    history.serves()
    silent(history, "tiny.1", in_flight=1, replica_in_flight={"tiny.1": 1})
    history.demand(in_flight=1, replica_in_flight={"tiny.1": 1})
    assert starts(history) == []


def test_requests_that_only_a_silent_replica_could_serve_are_told_that_there_is_no_room() -> None:
    history = history_of("n0", max_replicas=1)
    history.serves()
    node = history.view.nodes["n0"]
    silent(history, "tiny.1", waiting=1)
    small = replace(node, info=replace(node.info, memory_bytes=1000))
    history.view = replace(history.view, nodes={"n0": small})
    assert history.decides() == ()
    history.passes(11)
    silent(history, "tiny.1", waiting=1)
    assert [type(action) for action in history.decides()] == [FailDeployment]
