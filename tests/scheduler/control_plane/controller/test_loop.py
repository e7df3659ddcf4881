from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from paraserve_backend.errors import Unavailable
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan
from paraserve_scheduler.control_plane.config import SchedulerConfig
from paraserve_scheduler.control_plane.controller.loop import Controller
from paraserve_scheduler.control_plane.messages.gateways import route_table
from paraserve_scheduler.state.actions import StopReplica
from paraserve_scheduler.state.events import NodeCordoned
from paraserve_scheduler.state.records import Phase
from paraserve_scheduler.store.sqlite import SqliteStore
from paraserve_scheduler.testing import FakeAgent, FakeAgents
from tests.support.control_plane import FakeControlPlane, running
from tests.support.histories import LOST_PROCESS, NO_OBJECT, TRIED_AGAIN_S
from tests.support.scheduler_records import CONFIG, make_deployment, make_node_info


def _route(cluster: FakeControlPlane) -> pb.Route:
    (route,) = route_table(cluster.controller.view).routes
    return route


async def test_a_cold_start_applies_all_parts_at_once_and_then_opens_the_route() -> None:
    async with running() as cluster:
        n0, n1 = cluster.nodes.values()
        n0.may_finish.clear()
        n1.may_finish.clear()
        cluster.controller.add_deployment(make_deployment())
        await cluster.demand(waiting=1)
        assert cluster.held() == {("n0", "tiny.1"), ("n1", "tiny.1")}
        n0.may_finish.set()
        await cluster.settle()
        assert not _route(cluster).endpoints, "half a pipeline serves nobody"
        n1.may_finish.set()
        await cluster.settle()
        (endpoint,) = _route(cluster).endpoints
        assert (endpoint.replica, endpoint.model) == ("tiny.1", "tiny.1")
        assert endpoint.triton_grpc_address == "n0:8001"


async def test_parts_carry_disjoint_fetches_and_one_key_pair() -> None:
    async with running() as cluster:
        await cluster.serves()
        parts = [node.applied[0] for node in cluster.nodes.values()]
        plans = [FetchPlan.from_json(part.fetch.plan_json) for part in parts]
        names = [tensor.name for plan in plans for tensor in plan.tensors]
        assert sorted(names) == sorted(make_deployment().index.tensors)
        assert {plan.fetch_id for plan in plans} == {"tiny.1.0", "tiny.1.1"}
        assert parts[0].channel_keys == parts[1].channel_keys
        assert len(parts[0].channel_keys.secret_key) == 40
        assert parts[0].channel_keys.secret_key not in repr(cluster.controller.view)
        secret = parts[0].channel_keys.secret_key.encode()
        files = [text for part in parts for m in part.models for text in m.files.values()]
        assert not any(secret in text for text in files)


async def test_one_failed_part_leaves_nothing_on_any_node_and_fails_the_requests() -> None:
    async with running() as cluster:
        cluster.nodes["n1"].failures.append(NO_OBJECT)
        cluster.controller.add_deployment(make_deployment())
        await cluster.demand(waiting=1)
        assert cluster.held() == set()
        assert cluster.live() == ()
        route = _route(cluster)
        assert (route.failure.message, route.failure_number) == (NO_OBJECT.message, 1)


async def test_a_passing_failure_is_tried_again_with_a_new_replica() -> None:
    async with running() as cluster:
        cluster.nodes["n1"].failures.append(LOST_PROCESS)
        cluster.controller.add_deployment(make_deployment())
        await cluster.demand(waiting=1)
        (replica,) = cluster.live()
        assert (replica.id, replica.phase) == ("tiny.2", Phase.READY)
        assert cluster.held() == {("n0", "tiny.2"), ("n1", "tiny.2")}
        assert _route(cluster).failure_number == 0


async def test_an_agent_that_cannot_be_reached_fails_the_start() -> None:
    async with running() as cluster:
        cluster.nodes["n0"].reachable = False
        cluster.controller.add_deployment(make_deployment())
        await cluster.demand(waiting=1)
        await cluster.passes(TRIED_AGAIN_S)
        await cluster.demand(waiting=1)
        assert _route(cluster).failure.message == "The agent at n0:8500 cannot be reached."
        assert cluster.held() == set()


async def test_requests_wait_until_an_agent_that_cannot_be_reached_is_known_to_be_lost() -> None:
    async with running() as cluster:
        cluster.nodes["n0"].reachable = False
        cluster.controller.add_deployment(make_deployment())
        await cluster.demand(waiting=1)
        await cluster.passes(TRIED_AGAIN_S, silent=["n0"])
        await cluster.demand(waiting=1)
        (replica,) = cluster.live()
        assert replica.phase is Phase.READY
        assert [stage.node for stage in replica.plan.stages] == ["n1"]


async def test_a_scheduler_that_stood_still_does_not_take_its_nodes_for_lost() -> None:
    async with running() as cluster:
        await cluster.serves()
        await cluster.busy()
        cluster.clock.advance(CONFIG.node_timeout_s + 1, late=True)
        await cluster.settle()
        (replica,) = cluster.live()
        assert (replica.id, replica.phase) == ("tiny.1", Phase.READY)
        # Nor its gateways, whose requests would be forgotten.
        assert cluster.controller.view.without_silent_gateways(cluster.clock.now_s() - 1).gateways
        # Who is silent from then on is lost as ever.
        await cluster.passes(CONFIG.node_timeout_s + 1, silent=["n1"])
        assert [replica for replica in cluster.live() if replica.is_wanted] == []


async def test_a_lost_node_costs_only_its_replica() -> None:
    async with running(nodes=("n0", "n1", "n2")) as cluster:
        replica = await cluster.serves()
        lost = replica.plan.stages[1].node
        cluster.nodes[lost].reachable = False
        await cluster.demand(waiting=1)
        await cluster.passes(CONFIG.node_timeout_s, silent=[lost])
        await cluster.demand(waiting=1)
        await cluster.passes(0.5, silent=[lost])
        (after,) = cluster.live()
        assert after.plan.replica == "tiny.2"
        assert after.phase is Phase.READY
        assert lost not in {stage.node for stage in after.plan.stages}
        # The node comes back with its old part, which nobody wants.
        cluster.nodes[lost].reachable = True
        await cluster.heartbeats(lost)
        assert cluster.nodes[lost].parts == {}


async def test_an_idle_replica_goes_and_its_timeline_stays() -> None:
    async with running() as cluster:
        await cluster.serves()
        await cluster.demand(first_token_s={"tiny.1": 1_000.5})
        await cluster.passes(60)
        await cluster.demand()
        assert not _route(cluster).endpoints
        assert cluster.held(), "a request may still be on its way"
        await cluster.passes(CONFIG.settle_s)
        await cluster.demand()
        assert cluster.held() == set()
        record = cluster.controller.view.replicas["tiny.1"]
        assert record.phase is Phase.STOPPED
        assert (record.requested_s, record.ready_s) == (1_000.0, 1_000.0)
        assert (record.first_token_s, record.removed_s) == (1_000.5, 1_061.5)


async def test_a_deletion_during_the_start_returns_when_the_nodes_are_empty() -> None:
    async with running() as cluster:
        for node in cluster.nodes.values():
            node.may_finish.clear()
        cluster.controller.add_deployment(make_deployment())
        await cluster.demand(waiting=1)
        assert cluster.held()
        await cluster.controller.delete_deployment("tiny")
        assert cluster.held() == set()
        assert not route_table(cluster.controller.view).routes


async def test_a_name_that_is_deployed_again_goes_on_counting() -> None:
    async with running() as cluster:
        await cluster.serves()
        cluster.clock.advance(1)
        deletion = asyncio.create_task(cluster.controller.delete_deployment("tiny"))
        await cluster.settle()
        await cluster.passes(CONFIG.settle_s)
        await cluster.demand()
        await deletion
        assert (await cluster.serves()).id == "tiny.2"


async def test_every_action_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="paraserve_scheduler"):
        async with running() as cluster:
            await cluster.serves()
    (line,) = [record for record in caplog.records if hasattr(record, "action")]
    assert line.message.startswith("StartReplica tiny.1: 1 waits: layers [0, 2) on n0")


async def test_a_watcher_sees_every_change_of_what_it_watches_and_nothing_else() -> None:
    async with running() as cluster:
        cluster.controller.add_deployment(make_deployment())
        seen: list[int] = []

        async def watch() -> None:
            async for table in cluster.controller.watch(route_table):
                seen.append(sum(len(route.endpoints) for route in table.routes))

        watcher = asyncio.create_task(watch())
        await cluster.heartbeats()
        await cluster.demand(waiting=1)
        await cluster.heartbeats()
        watcher.cancel()
        assert seen == [0, 1]


async def test_a_bug_ends_the_controller_loudly() -> None:
    async def break_it() -> None:
        async with running() as cluster:
            stranger = FakeAgent(make_node_info("n2"))  # unknown to the fake agents: KeyError
            cluster.controller.notify(stranger.registered(cluster.clock.now_s()))
            cluster.controller.notify(stranger.heartbeat(cluster.clock.now_s()))
            cluster.controller.add_deployment(make_deployment())
            await cluster.demand(waiting=1)

    with pytest.raises(ExceptionGroup):
        await break_it()


# ---- hand-overs ----


async def test_a_pipeline_is_consolidated_and_its_nodes_are_empty_but_for_the_full_instance() -> (
    None
):
    async with running() as cluster:
        await cluster.hands_over()
        pipeline, successor = cluster.live()
        head = pipeline.plan.head.node
        assert successor.plan.head.node == head
        assert [endpoint.replica for endpoint in _route(cluster).endpoints] == ["tiny.2"]
        assert cluster.nodes[head].hand_overs == {
            "tiny.1": {"tiny.2": successor.plan.hand_over.url}
        }
        assert cluster.held() == {("n0", "tiny.1"), ("n1", "tiny.1"), (head, "tiny.2")}
        await cluster.passes(CONFIG.settle_s)
        await cluster.busy("tiny.2")
        assert cluster.held() == {(head, "tiny.2")}
        record = cluster.controller.view.replicas["tiny.1"]
        assert record.phase is Phase.STOPPED
        assert (record.hand_over.since_s, record.removed_s) == (1_002.0, 1_003.5)


async def test_all_replicas_of_a_deployment_share_its_keys_and_others_have_their_own() -> None:
    async with running() as cluster:
        await cluster.hands_over()
        cluster.controller.add_deployment(make_deployment("other"))
        await cluster.demand("other", waiting=1)
        applied = [part for node in cluster.nodes.values() for part in node.applied]
        secrets = {(part.deployment, part.channel_keys.secret_key) for part in applied}
        assert {part.replica for part in applied} == {"tiny.1", "tiny.2", "other.1"}
        assert len(secrets) == len({deployment for deployment, _ in secrets}) == 2


async def test_only_a_successor_that_nobody_waits_for_is_fetched_in_the_background() -> None:
    async with running() as cluster:
        await cluster.hands_over()
        applied = [part for node in cluster.nodes.values() for part in node.applied]
        background = {(part.replica, part.fetch.background) for part in applied}
        assert background == {("tiny.1", False), ("tiny.2", True)}


async def test_a_head_that_cannot_be_reached_is_told_again() -> None:
    async with running() as cluster:
        await cluster.serves(consolidate=True)
        await cluster.busy()
        (pipeline,) = cluster.live()
        head = cluster.nodes[pipeline.plan.head.node]
        head.may_finish.clear()
        await cluster.passes(CONFIG.consolidation.after_s)
        head.refuses_hand_overs = True
        head.may_finish.set()
        await cluster.settle()
        head.refuses_hand_overs = False
        assert head.hand_overs == {}
        assert cluster.live()[0].hand_over.since_s is not None
        await cluster.passes(CONFIG.consolidation.hand_over_retry_s)
        assert list(head.hand_overs["tiny.1"]) == ["tiny.2"]


async def test_a_successor_that_cannot_start_leaves_nothing_behind_and_the_pipeline_serving() -> (
    None
):
    async with running() as cluster:
        replica = await cluster.serves(consolidate=True)
        await cluster.busy()
        cluster.nodes[replica.plan.head.node].failures.append(NO_OBJECT)
        await cluster.passes(CONFIG.consolidation.after_s)
        assert cluster.held() == {("n0", "tiny.1"), ("n1", "tiny.1")}
        route = _route(cluster)
        assert [endpoint.replica for endpoint in route.endpoints] == ["tiny.1"]
        assert (route.failure_number, list(route.lost_replicas)) == (0, [])


async def test_a_command_needs_a_running_controller(tmp_path: Path) -> None:
    async with running(tmp_path / "state.db") as cluster:
        await cluster.stop_scheduler()
        store = SqliteStore(tmp_path / "other.db")
        stopped = Controller(
            store=store, agents=FakeAgents([]), clock=cluster.clock, config=SchedulerConfig()
        )
        with pytest.raises(Unavailable, match="still starting"):
            stopped.carry_out(StopReplica(replica="tiny.1", reason="a user said so"))
        store.close()


# ---- restarts of the scheduler ----


async def test_a_hand_over_goes_on_with_the_next_scheduler(tmp_path: Path) -> None:
    async with running(tmp_path / "state.db") as cluster:
        await cluster.hands_over()
        head = cluster.nodes[cluster.live()[0].plan.head.node]
        told = dict(head.hand_overs)
        head.hand_overs.clear()
        await cluster.restart_scheduler()
        await cluster.register()
        await cluster.busy()
        assert [endpoint.replica for endpoint in _route(cluster).endpoints] == ["tiny.2"]
        assert head.hand_overs == told, "it is told again"
        await cluster.passes(CONFIG.settle_s)
        await cluster.busy("tiny.2")
        assert cluster.held() == {(head.info.name, "tiny.2")}


async def test_a_successor_that_was_starting_is_waited_for_by_the_next_scheduler(
    tmp_path: Path,
) -> None:
    async with running(tmp_path / "state.db") as cluster:
        await cluster.serves(consolidate=True)
        await cluster.busy()
        for node in cluster.nodes.values():
            node.may_finish.clear()
        await cluster.passes(CONFIG.consolidation.after_s)
        await cluster.restart_scheduler()
        await cluster.register()
        await cluster.busy()
        assert [replica.id for replica in cluster.live()] == ["tiny.1", "tiny.2"]
        assert [endpoint.replica for endpoint in _route(cluster).endpoints] == ["tiny.1"]
        head = cluster.live()[1].plan.head.node
        cluster.nodes[head].set_part("tiny.2", 0, Phase.READY)
        await cluster.heartbeats()
        assert [endpoint.replica for endpoint in _route(cluster).endpoints] == ["tiny.2"]


async def test_a_pause_after_failures_and_a_drain_outlast_the_scheduler(tmp_path: Path) -> None:
    async with running(tmp_path / "state.db") as cluster:
        replica = await cluster.serves(consolidate=True)
        await cluster.busy()
        cluster.nodes[replica.plan.head.node].failures.append(NO_OBJECT)
        await cluster.passes(CONFIG.consolidation.after_s)
        cluster.controller.notify(NodeCordoned(node="n7"))
        await cluster.restart_scheduler()
        await cluster.register()
        await cluster.busy()
        await cluster.passes(CONFIG.consolidation.after_s)
        assert [replica.id for replica in cluster.live()] == ["tiny.1"]
        assert cluster.controller.view.cordoned == {"n7"}
        await cluster.passes(CONFIG.consolidation.retry_s)
        await cluster.busy()
        assert [replica.id for replica in cluster.live()] == ["tiny.1", "tiny.3"]


async def test_a_new_scheduler_takes_over_serving_replicas(tmp_path: Path) -> None:
    async with running(tmp_path / "state.db") as cluster:
        before = await cluster.serves()
        await cluster.restart_scheduler()
        assert not _route(cluster).endpoints, "no node has confirmed it yet"
        await cluster.register("n0")
        assert not _route(cluster).endpoints
        await cluster.register("n1")
        (after,) = cluster.live()
        assert after.phase is Phase.READY
        assert (after.plan, after.ready_s) == (before.plan, before.ready_s)
        assert [endpoint.replica for endpoint in _route(cluster).endpoints] == ["tiny.1"]
        assert all(len(node.applied) == 1 for node in cluster.nodes.values())
        assert not any(node.removed for node in cluster.nodes.values())


async def test_a_replica_that_lost_a_part_meanwhile_is_stopped(tmp_path: Path) -> None:
    async with running(tmp_path / "state.db") as cluster:
        await cluster.serves()
        cluster.nodes["n1"].parts.clear()
        await cluster.restart_scheduler()
        await cluster.register()
        assert cluster.live() == ()
        assert cluster.held() == set()


async def test_a_start_that_was_under_way_goes_on_without_new_commands(tmp_path: Path) -> None:
    async with running(tmp_path / "state.db") as cluster:
        for node in cluster.nodes.values():
            node.may_finish.clear()
        cluster.controller.add_deployment(make_deployment())
        await cluster.demand(waiting=1)
        await cluster.restart_scheduler()
        await cluster.register()
        (replica,) = cluster.live()
        assert replica.phase is Phase.STARTING
        for node in cluster.nodes.values():
            for key in node.parts:
                node.set_part(*key, Phase.READY)
        await cluster.heartbeats()
        (replica,) = cluster.live()
        assert replica.phase is Phase.READY


async def test_nodes_that_do_not_come_back_cost_their_replicas(tmp_path: Path) -> None:
    async with running(tmp_path / "state.db") as cluster:
        await cluster.serves()
        await cluster.restart_scheduler()
        await cluster.register("n0")
        await cluster.passes(CONFIG.recovery_grace_s, silent=["n1"])
        assert cluster.live()
        await cluster.passes(0.1, silent=["n1"])
        assert cluster.live() == ()
        # It does come back: what it still has is removed then.
        await cluster.register("n1")
        assert cluster.held() == set()


async def test_what_a_crashed_scheduler_never_recorded_is_removed(tmp_path: Path) -> None:
    async with running(tmp_path / "state.db") as cluster:
        cluster.nodes["n0"].set_part("other.3", 0, Phase.READY)
        await cluster.heartbeats()
        assert cluster.nodes["n0"].removed == ["other.3"]
        assert cluster.held() == set()


async def test_failure_and_replica_numbers_go_on_after_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path / "state.db") as cluster:
        cluster.nodes["n0"].failures.append(NO_OBJECT)
        cluster.controller.add_deployment(make_deployment())
        await cluster.demand(waiting=1)
        assert _route(cluster).failure_number == 1
        await cluster.restart_scheduler()
        await cluster.register()
        assert _route(cluster).failure_number == 1
        await cluster.demand(waiting=1)
        (replica,) = cluster.live()
        assert replica.id == "tiny.2"


async def test_a_deletion_is_finished_by_the_next_scheduler(tmp_path: Path) -> None:
    async with running(tmp_path / "state.db") as cluster:
        await cluster.serves()
        deletion = asyncio.create_task(cluster.controller.delete_deployment("tiny"))
        await cluster.settle()
        deletion.cancel()
        await cluster.restart_scheduler()
        await cluster.register()
        await cluster.passes(CONFIG.settle_s)
        assert cluster.held() == set()
        assert not cluster.controller.view.deployments
        assert not cluster.store.deployments()
