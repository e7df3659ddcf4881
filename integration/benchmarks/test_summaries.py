"""The benchmarks' last lines, without running them."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest

from integration.benchmarks import simulate as bench_simulate
from integration.benchmarks.coldstart import run as bench_coldstart
from integration.benchmarks.coldstart.chart import chart
from integration.benchmarks.coldstart.report import markdown
from integration.benchmarks.coldstart.summary import Results, Start
from integration.benchmarks.coldstart.summary import summary as coldstart_summary
from integration.benchmarks.coldstart.targets import TARGETS
from integration.benchmarks.coldstart.variants import VARIANTS
from integration.benchmarks.fetch import run as bench_fetch
from integration.benchmarks.fetch.run import Fetched, Store
from integration.benchmarks.gateway import run as bench_gateway
from integration.benchmarks.gateway.run import Figures, Throughput
from integration.benchmarks.hop import run as bench_hop
from integration.benchmarks.overload import run as bench_overload
from integration.clients import environments
from integration.support.rest import busy_share
from paraserve_backend.errors import InvalidRequest, ParaServeError
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.simulator.workload import SimRequest

_HOP_FIGURES = {
    "ratio_8kb": 2.5,
    "ratio_4mb": 5.0,
    "hop_8kb_ms": 0.3,
    "token_loop_overhead_ms": 0.2,
}


def fetched(mb_per_s: float = 119.0, cpu_s_per_gb: float = 1.0) -> Fetched:
    return Fetched(mb_per_s=mb_per_s, cpu_s_per_gb=cpu_s_per_gb)


def fetch_missed(ours: list[Fetched], other: list[Fetched]) -> object:
    runs = {("paraserve", len(ours)): ours, ("other", len(other)): other}
    return bench_fetch.summary(runs, line_rate_mb_per_s=120.0)["missed"]


def test_a_figure_at_its_target_meets_it() -> None:
    result = bench_hop.summary(_HOP_FIGURES)
    assert result["met"] is True
    assert result["missed"] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("ratio_8kb", 2.4), ("ratio_4mb", 4.9), ("hop_8kb_ms", 0.31), ("token_loop_overhead_ms", 1)],
)
def test_a_missed_hop_target_is_named(name: str, value: float) -> None:
    result = bench_hop.summary({**_HOP_FIGURES, name: value})
    assert result["met"] is False
    assert result["missed"] == [name]


@pytest.mark.parametrize(
    ("once_s", "twice_s", "is_met"),
    [(120.0, 264.0, True), (120.1, 240.0, False), (10.0, 23, False)],
)
def test_a_simulation_must_be_quick_and_take_twice_as_long_for_twice_as_much(
    once_s: float, twice_s: float, is_met: bool
) -> None:
    assert bench_simulate.summary(once_s, twice_s)["met"] is is_met


def test_requests_are_repeated_at_the_rate_they_have() -> None:
    times = [1.0, 2.0, 4.0]
    once = [
        SimRequest(deployment="d", arrival_s=at_s, prompt_tokens=1, output_tokens=1)
        for at_s in times
    ]
    twice = bench_simulate.repeated(once, 2)
    assert [request.arrival_s for request in twice] == [*times, 5.5, 6.5, 8.5]
    assert len({id(request) for request in twice}) == 6


def test_a_fetch_at_line_rate_with_the_least_cpu_meets_its_targets() -> None:
    assert fetch_missed([fetched(116.4)], [fetched(119.9, 1.01)]) == []


def test_the_slowest_node_counts_for_the_line_rate() -> None:
    slow = [fetched(), fetched(), fetched(), fetched(116.3)]
    assert fetch_missed(slow, [fetched()] * 4) == ["line_rate_4"]


def test_another_client_with_less_cpu_time_is_a_miss() -> None:
    assert fetch_missed([fetched()], [fetched(50.0, 0.99)]) == ["cpu_1"]


def test_the_object_has_the_asked_size_and_the_returned_checksum(tmp_path: Path) -> None:
    path = tmp_path / "bucket" / "object"
    checksum = bench_fetch.write_object(path, (1 << 24) + 5)
    content = path.read_bytes()
    assert len(content) == (1 << 24) + 5
    assert zlib.crc32(content) == checksum


def test_a_client_that_read_other_bytes_fails_the_benchmark() -> None:
    store = Store(endpoint="http://127.0.0.1", size_bytes=10, crc32=1)
    line = json.dumps({"seconds": 1.0, "cpu_s": 1.0, "crc32": 2})
    with pytest.raises(ParaServeError, match="other bytes"):
        bench_fetch.read_report(line, store)


def gateway_missed(*, added_ms: float = 0.5, **ratios: float) -> object:
    """What is missed if the named loads have these ratios and all others are at their target."""
    throughput = {
        name: Throughput(
            direct_per_s=100.0, gateway_per_s=90.0, ratio=ratios.get(name, 0.9), gateway_cpu_us=80.0
        )
        for name in bench_gateway.LOADS
    }
    figures = Figures(
        direct_p50_ms=1.0,
        gateway_p50_ms=1.0 + added_ms,
        resume_p50_ms=2.0,
        throughput=throughput,
    )
    result = bench_gateway.summary(figures)
    assert result["met"] is (result["missed"] == [])
    return result["missed"]


def test_a_gateway_at_nine_tenths_of_the_paced_tokens_meets_its_targets() -> None:
    assert gateway_missed() == []


def test_each_paced_load_has_a_target_of_its_own_and_a_flat_out_one_has_none() -> None:
    assert gateway_missed(paced_16=0.89, flat_out_1=0.4) == ["paced_16_ratio"]


def test_what_the_gateway_adds_to_a_request_is_limited() -> None:
    assert gateway_missed(added_ms=0.71) == ["added_p50_ms"]


@pytest.mark.parametrize(
    ("failures", "skipped", "met"), [(0, 0, True), (1, 0, False), (0, 1, False)]
)
def test_clients_are_shown_to_work_only_if_none_failed_and_none_was_skipped(
    failures: int, skipped: int, met: bool
) -> None:
    suite = f'<testsuite tests="9" failures="{failures}" errors="0" skipped="{skipped}"/>'
    result = environments.summary(f"<testsuites>{suite}</testsuites>", {"curl": "8"})
    assert result["met"] is met
    assert result["passed"] == 9 - failures - skipped


def cold(
    variant: str, ttft_s: float, token_ids: tuple[int, ...] = (1, 2), *, warm_ttft_s: float = 0.1
) -> Start:
    return Start(
        variant=variant,
        ttft_s=ttft_s,
        warm_ttft_s=warm_ttft_s,
        token_ids=token_ids,
        peak_bytes=10**9,
    )


def results(*starts: Start) -> Results:
    """Of checkpoints of 2 and 1 GB, and links of 100 MB/s where 1 Gbit/s was asked for."""
    names = {start.variant for start in starts}
    return Results(
        variants=[variant for variant in VARIANTS if variant.name in names],
        starts=starts,
        checkpoint_bytes={"2gb": 2 * 10**9, "1gb": 10**9},
        link_bytes_per_s={1.0: 1e8, 0.5: 5e7, 0.25: 2.5e7},
    )


def coldstart_missed(*starts: Start) -> object:
    result = coldstart_summary(results(*starts), TARGETS)
    assert result["met"] is (result["missed"] == [])
    return result["missed"]


def test_the_limit_is_the_transfer_over_all_links_and_one_forward_pass() -> None:
    of = results(cold("ours-4-slots", 6.0, warm_ttft_s=0.2), cold("mixed-slots", 8.0))
    four, mixed = of.variants
    assert of.limit_s(four) == pytest.approx(2e9 / 4e8 + 0.2)
    assert of.transfer_s(mixed) == pytest.approx(2e9 / 2.75e8)


def test_what_is_in_memory_already_has_a_forward_pass_as_its_limit() -> None:
    of = results(cold("memory-1-slots", 0.2))
    assert of.limit_s(of.variants[0]) == pytest.approx(0.1)


def test_what_a_disk_or_a_peer_gives_has_no_known_limit() -> None:
    of = results(cold("disk-1-slots-1gb", 1.0), cold("peer-1-slots-1gb", 9.0))
    assert [of.limit_s(variant) for variant in of.variants] == [None, None]


def test_medians_are_compared_and_a_figure_at_its_target_meets_it() -> None:
    starts = [cold("ours-4-slots", ttft_s) for ttft_s in (99.0, 5.1 * 1.15, 0.1)]
    quo = [cold("status-quo", 5.1 * 1.15 * 4.8)] * 3
    assert coldstart_missed(*starts, *quo) == []


def test_each_missed_coldstart_target_is_named() -> None:
    starts = (cold("ours-4-slots", 6.0), cold("status-quo", 28.0), cold("memory-1-slots", 0.31))
    assert coldstart_missed(*starts) == [
        "ours-4-slots over its limit",
        "ours-4-slots faster than status-quo",
        "memory-1-slots, s",
    ]


def test_a_target_holds_only_where_all_its_variants_were_run() -> None:
    assert coldstart_missed(cold("ours-1", 1000.0)) == []


def test_the_status_quo_to_compare_with_has_the_same_model_and_link() -> None:
    of = results(
        cold("status-quo", 20.0),
        cold("status-quo-1gb", 10.0),
        cold("status-quo-half", 40.0),
        cold("ours-4-1gb", 5.0),
        cold("ours-8", 8.0),
    )
    speedups = {variant.name: of.speedup(variant) for variant in of.variants}
    assert speedups["ours-4-1gb"] == 2.0
    assert speedups["ours-8"] == 5.0


def test_starts_of_ours_that_answer_differently_fail_the_benchmark() -> None:
    with pytest.raises(ParaServeError, match="different tokens"):
        coldstart_missed(cold("ours-1", 1.0), cold("ours-4", 1.0, token_ids=(1, 3)))


def test_transformers_may_round_another_way() -> None:
    coldstart_missed(cold("ours-1", 1.0), cold("status-quo", 1.0, token_ids=(1, 3)))


def test_a_start_comes_back_from_its_line_as_it_was() -> None:
    replica = pb.ReplicaStatus(replica="ours.1", requested_s=1.5, parts=[pb.ReplicaPart(node="n")])
    start = dataclasses.replace(cold("ours-1", 1.0), replica=replica)
    assert Start.from_json(json.loads(json.dumps(start.to_json()))) == start


def test_bytes_without_a_stated_origin_are_the_stores() -> None:
    def part(total_bytes: int, **origins: int) -> pb.ReplicaPart:
        spans = [pb.Span(name=f"fetch from {name}", bytes=size) for name, size in origins.items()]
        return pb.ReplicaPart(status=pb.PartStatus(total_bytes=total_bytes, spans=spans))

    replica = pb.ReplicaStatus(parts=[part(10), part(7, tier=5, store=2)])
    start = dataclasses.replace(cold("ours-2", 1.0), replica=replica)
    assert start.bytes_from == {"store": 12, "tier": 5}


def test_the_plot_is_well_formed_and_shows_every_variant() -> None:
    of = results(*(cold(variant.name, 1.0 + place) for place, variant in enumerate(VARIANTS)))
    drawn = ElementTree.fromstring(chart(of))
    texts = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    for variant in VARIANTS:
        assert variant.testbed.name in texts
        assert any(text and text.startswith(variant.label) for text in texts)


def test_the_page_has_a_row_for_every_variant_and_says_what_was_missed() -> None:
    of = results(*(cold(variant.name, 9.0) for variant in VARIANTS))
    page = markdown(of, {"rounds": 1} | coldstart_summary(of, TARGETS))
    for variant in VARIANTS:
        assert f"| {variant.testbed.name} | {variant.label} | " in page
    assert "| memory-1-slots, s | 9.00 | 0.3 | **missed** |" in page
    assert "| + pipeline | 9.0 |" in page


def test_a_variant_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="ours-5"):
        bench_coldstart.chosen(["ours-5"])


def test_what_others_left_behind_is_of_a_variant_on_the_same_cluster() -> None:
    by_name = {variant.name: variant for variant in VARIANTS}
    assert len(by_name) == len(VARIANTS)
    for variant in VARIANTS:
        if variant.source != variant.name:
            before = by_name[variant.source]
            assert VARIANTS.index(before) < VARIANTS.index(variant)
            assert (before.testbed, before.checkpoint) == (variant.testbed, variant.checkpoint)


def test_time_spent_waiting_for_disks_is_not_busy() -> None:
    before = "cpu  10 0 10 100 0 0 0 0 0 0\ncpu0 1 2 3\n"
    now = "cpu  20 0 20 140 40 0 0 0 0 0\ncpu0 1 2 3\n"
    assert busy_share(before, now) == pytest.approx(0.2)


def test_overload_is_met_by_its_targets_alone_and_a_skip_meets_none() -> None:
    figures = {name: limit for name, (_, limit) in bench_overload.TARGETS.items()}
    assert bench_overload.summary(figures)["met"]
    worse = {**figures, "held_lost": 1, "running_ratio_300": 0.89}
    assert bench_overload.summary(worse)["missed"] == ["running_ratio_300", "held_lost"]
    skipped = bench_overload.summary({}, skipped="There is no Triton.")
    assert (skipped["met"], skipped["skipped"]) == (False, "There is no Triton.")
