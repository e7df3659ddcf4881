"""Who a fetch may read from, and where requests go, as nodes tell it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.control_plane.messages.agents import (
    node_info,
    node_reported,
    part_state,
    peer_addresses,
)
from paraserve_scheduler.control_plane.messages.gateways import route_table
from paraserve_scheduler.control_plane.messages.status import cluster_status
from paraserve_scheduler.reconciler.config import PolicyConfig
from paraserve_scheduler.reconciler.model_shapes import held_keys
from paraserve_scheduler.reconciler.turn import Turn
from paraserve_scheduler.state.events import NodeRegistered, PartReported
from paraserve_scheduler.state.fold import fold
from paraserve_scheduler.state.records import Phase
from paraserve_scheduler.state.spec import Deployment
from paraserve_scheduler.state.view import ClusterView
from tests.support.histories import LOST_PROCESS, History
from tests.support.scheduler_records import NOW_S, make_deployment, make_state


def reported(
    deployment: Deployment,
    landed_bytes: dict[str, int],
    version: str | None = None,
    endpoint: str | None = None,
) -> ClusterView:
    """A view after heartbeats of nodes that hold so much of the deployment's one object."""
    (stored,) = deployment.index.objects
    index = deployment.index
    store = replace(index.store, endpoint=endpoint) if endpoint else index.store
    view = ClusterView(started_s=NOW_S, listening_since_s=NOW_S)
    for number, (name, size_bytes) in enumerate(landed_bytes.items()):
        info = node_info(pb.NodeInfo(name=name, peer_address=f"10.0.0.{number}:1"))
        view = fold(view, NodeRegistered(info=info, at_s=NOW_S))
        held = pb.TierObject(
            key=store.key_of(index.source_uri, stored.key),
            version=version or stored.version,
            landed_bytes=size_bytes,
        )
        status = pb.NodeStatus(name=name, triton_live=True, tier=[held])
        view = fold(view, node_reported(status, NOW_S))
    return view


def turn_of(view: ClusterView, now_s: float = NOW_S) -> Turn:
    return Turn(view=view, now_s=now_s, config=PolicyConfig())


def test_a_node_that_is_lost_is_no_peer_whoever_has_its_address_now() -> None:
    deployment = make_deployment()
    view = reported(deployment, {"a": 5})
    lost_s = NOW_S + PolicyConfig().node_timeout_s + 1
    assert peer_addresses(turn_of(view, lost_s), deployment, "b") == ()


def test_nodes_that_have_most_come_first_and_the_node_itself_not_at_all() -> None:
    deployment = make_deployment()
    view = reported(deployment, {"a": 5, "b": 0, "c": 9, "d": 7, "e": 1, "f": 6}, None)
    assert peer_addresses(turn_of(view), deployment, "c") == (
        "10.0.0.3:1",
        "10.0.0.5:1",
        "10.0.0.0:1",
    )


def test_another_version_is_nothing() -> None:
    deployment = make_deployment()
    view = reported(deployment, {"a": 5}, "another")
    assert peer_addresses(turn_of(view), deployment, "b") == ()


def test_the_same_name_in_another_store_is_nothing() -> None:
    deployment = make_deployment()
    view = reported(deployment, {"a": 5}, endpoint="http://10.6.6.6:9000")
    assert peer_addresses(turn_of(view), deployment, "b") == ()
    tier = view.nodes["a"].tier
    assert [found for found in tier if found.key in held_keys(deployment)] == []


def test_a_node_that_serves_nobody_is_no_peer() -> None:
    deployment = make_deployment()
    view = reported(deployment, {"a": 5}, None)
    silent = replace(view.nodes["a"], info=replace(view.nodes["a"].info, peer_address=""))
    assert peer_addresses(turn_of(replace(view, nodes={"a": silent})), deployment, "b") == ()


def test_requests_for_a_replica_in_a_slot_go_to_the_slots_model() -> None:
    history = History()
    replica = history.serves()
    bound = pb.PartStatus(replica=replica, phase=pb.READY, slots={replica: "slot-3.front"})
    history.happens(PartReported(part=part_state(bound), at_s=NOW_S))
    (route,) = route_table(history.view).routes
    (endpoint,) = route.endpoints
    assert (endpoint.replica, endpoint.model) == (replica, "slot-3.front")


def _route(history: History) -> pb.Route:
    (route,) = route_table(history.view).routes
    return route


def _deployed(longest_token_bytes: int = 0, **spec: Any) -> History:
    deployment = replace(make_deployment(**spec), longest_token_bytes=longest_token_bytes)
    return History(deployments=[make_state(deployment)])


def test_a_replica_is_given_two_batches_at_most() -> None:
    history = _deployed(max_sequences=7)
    history.serves()
    (endpoint,) = _route(history).endpoints
    assert endpoint.max_ongoing == 14


def test_before_a_start_the_context_is_what_the_user_or_the_model_allows() -> None:
    assert _route(_deployed()).max_context == 512
    assert _route(_deployed(max_context=64)).max_context == 64


def test_the_context_of_a_replica_that_serves_is_the_routes() -> None:
    history = _deployed()
    name = history.serves()
    replica = history.view.replicas[name]
    small = replace(replica, plan=replace(replica.plan, max_context=300))
    history.view = replace(history.view, replicas={name: small})
    assert _route(history).max_context == 300


def test_a_context_of_any_length_fits_into_the_message() -> None:
    deployment = replace(make_deployment(), longest_token_bytes=100_000_000)
    endless = replace(deployment, model=replace(deployment.model, context_length=10**30))
    route = _route(History(deployments=[make_state(endless)]))
    assert route.max_prompt_bytes == route.max_context * 100_000_000


def test_the_longest_prompt_is_the_context_full_of_longest_tokens() -> None:
    assert _route(_deployed(longest_token_bytes=48, max_context=64)).max_prompt_bytes == 64 * 48
    assert _route(_deployed(max_context=64)).max_prompt_bytes == 0


def test_the_status_says_how_many_replicas_died_and_until_when_starts_pause() -> None:
    history = History()
    for deaths in range(1, 6):
        replica = history.serves()
        history.part(replica, 0, Phase.FAILED, LOST_PROCESS)
        history.decides()
        history.removed(replica)
        (status,) = cluster_status(history.turn()).deployments
        assert status.recent_deaths == deaths
        until_s = history.now_s + 10 if deaths == 5 else 0
        assert status.starts_paused_until_s == until_s
    history.passes(10.5)
    (status,) = cluster_status(history.turn()).deployments
    assert (status.recent_deaths, status.starts_paused_until_s) == (5, 0)
