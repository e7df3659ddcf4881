from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.cli.views import timeline


def part(
    node: str, layers: tuple[int, int], *spans: tuple[str, float, float, int], ready: bool = True
) -> pb.ReplicaPart:
    return pb.ReplicaPart(
        node=node,
        layer_start=layers[0],
        layer_end=layers[1],
        status=pb.PartStatus(
            phase=pb.READY if ready else pb.STARTING,
            fetched_bytes=40_000_000,
            spans=[
                pb.Span(name=name, start_s=start_s, end_s=end_s, bytes=size)
                for name, start_s, end_s, size in spans
            ],
        ),
    )


def replica(*parts: pb.ReplicaPart, first_token_s: float = 104.0) -> pb.ReplicaStatus:
    return pb.ReplicaStatus(
        replica="tiny.7",
        requested_s=100.0,
        planned_s=100.5,
        ready_s=103.0,
        first_token_s=first_token_s,
        parts=parts,
    )


def two_stages() -> pb.ReplicaStatus:
    return replica(
        part("b", (2, 4), ("fetch", 100.5, 102.5, 100_000_000)),
        part(
            "a",
            (0, 2),
            ("load tiny.7.stage0", 100.6, 103.0, 0),
            ("fetch", 100.5, 101.5, 50_000_000),
        ),
    )


def drawn(status: pb.ReplicaStatus, width: int = 100) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(timeline.render(status, width=width))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_rows_are_relative_to_the_demand_and_in_the_order_of_the_stages() -> None:
    found = [(row.where, row.what, row.start_s, row.end_s) for row in timeline.rows(two_stages())]
    assert found == [
        ("scheduler", "plan", 0.0, 0.5),
        ("a", "fetch", 0.5, 1.5),
        ("a", "load stage0", pytest.approx(0.6), 3.0),
        ("a", "ready [0, 2)", 3.0, 3.0),
        ("b", "fetch", 0.5, 2.5),
        ("b", "ready [2, 4)", 2.5, 2.5),
        ("scheduler", "all ready", 3.0, 3.0),
        ("scheduler", "first token", 4.0, 4.0),
    ]


def test_only_transfers_have_a_rate() -> None:
    rates = {row.what: row.bytes_per_s for row in timeline.rows(two_stages()) if row.where == "a"}
    assert rates == {"fetch": 50e6, "load stage0": None, "ready [0, 2)": None}


def test_what_still_runs_ends_at_the_latest_known_time_and_counts_its_bytes_so_far() -> None:
    running = part(
        "a", (0, 4), ("write models", 100.5, 101.0, 0), ("fetch", 100.5, 0, 0), ready=False
    )
    fetch = next(row for row in timeline.rows(replica(running)) if row.what == "fetch")
    assert fetch.is_running
    assert (fetch.end_s, fetch.size_bytes) == (1.0, 40_000_000)


def test_a_replica_that_is_only_planned_can_be_drawn() -> None:
    assert timeline.rows(pb.ReplicaStatus(replica="tiny.1", requested_s=5.0)) == ()
    assert "tiny.1" in drawn(pb.ReplicaStatus(replica="tiny.1", requested_s=5.0))


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_picture_fits_the_terminal_and_names_every_node_once(width: int) -> None:
    lines = drawn(two_stages(), width).splitlines()
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines if line.split()[0] in "ab"] == ["a", "b"]
    assert "2 stages, first token after 4.00 s" in lines[0]


def test_bars_start_and_end_where_their_times_are() -> None:
    row = next(line for line in drawn(two_stages(), 94).splitlines() if line.startswith("b "))
    axis = next(line for line in drawn(two_stages(), 94).splitlines() if line.endswith("MB/s"))
    begin = axis.index(" 0 ") + 1
    # 40 columns for 4 seconds: the fetch runs from 0.5 to 2.5.
    assert row[begin : begin + 40].rstrip() == " " * 5 + "█" * 20
    assert row.split()[-3:] == ["2.00", "100.0", "50"]


def test_the_chrome_trace_has_every_row_once_and_a_name_for_every_place() -> None:
    trace = json.loads(json.dumps(timeline.chrome_trace(two_stages())))
    events = trace["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert set(names.values()) == {"scheduler", "a", "b"}
    spans = {
        (names[event["pid"]], event["name"]): (event["ts"], event.get("dur"))
        for event in events
        if event["ph"] != "M"
    }
    assert len(spans) == len(timeline.rows(two_stages()))
    assert spans["b", "fetch"] == (500_000, 2_000_000)
    assert spans["scheduler", "first token"] == (4_000_000, None)


def test_the_newest_cold_start_is_the_one_asked_for_last() -> None:
    old = pb.ReplicaStatus(replica="a.1", requested_s=1.0)
    new = pb.ReplicaStatus(replica="b.1", requested_s=2.0)
    status = pb.ClusterStatus(
        deployments=[pb.DeploymentStatus(replicas=[new]), pb.DeploymentStatus(replicas=[old])]
    )
    assert timeline.newest(status) == new
    assert timeline.newest(pb.ClusterStatus()) is None


def consolidated(*, ended: bool = True) -> pb.ClusterStatus:
    """Two stages that a whole replica took over from, after one that failed."""
    old = two_stages()
    old.hand_over_begin_s = 108.0
    old.hand_over_end_s = 108.5 if ended else 0.0
    failed = pb.ReplicaStatus(replica="tiny.8", succeeds="tiny.7", requested_s=104.5)
    failed.failure.message = "no luck"
    new = pb.ReplicaStatus(
        replica="tiny.9",
        succeeds="tiny.7",
        requested_s=105.0,
        ready_s=108.0,
        parts=[
            part(
                "a",
                (0, 4),
                ("fetch", 105.0, 107.0, 50_000_000),
                ("load tiny.9", 105.0, 108.0, 0),
            )
        ],
    )
    return pb.ClusterStatus(deployments=[pb.DeploymentStatus(replicas=[old, failed, new])])


def test_the_newest_cold_start_is_shown_with_what_took_over_from_it() -> None:
    status = consolidated()
    newest = timeline.newest(status)
    assert newest is not None
    assert newest.replica == "tiny.7"
    (successor,) = timeline.successors(status, newest)
    assert successor.replica == "tiny.9"
    later = timeline.rows(newest, [successor])[len(two_stages().parts) + 6 :]
    assert [(row.where, row.what, row.start_s, row.end_s) for row in later] == [
        ("a", "fetch .9", 5.0, 7.0),
        ("a", "load generate .9", 5.0, 8.0),
        ("a", "ready [0, 4) .9", 8.0, 8.0),
        ("scheduler", "hand over", 8.0, 8.5),
    ]


def test_later_moves_are_not_part_of_the_picture() -> None:
    status = consolidated()
    moved = pb.ReplicaStatus(replica="tiny.10", succeeds="tiny.9", requested_s=200.0)
    status.deployments[0].replicas.append(moved)
    newest = timeline.newest(status)
    assert newest is not None
    found = timeline.successors(status, newest)
    assert [replica.replica for replica in found] == ["tiny.9"]


def test_a_hand_over_that_has_not_ended_says_so() -> None:
    (*_, row) = timeline.rows(consolidated(ended=False).deployments[0].replicas[0])
    assert (row.what, row.is_running) == ("hand over", True)


def test_the_title_says_when_the_pipeline_had_handed_over() -> None:
    old = consolidated().deployments[0].replicas[0]
    assert "first token after 4.00 s, handed over after 8.50 s" in drawn(old, 140)
