"""The benchmarks' last lines, without running them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest

from integration import bench_fetch, bench_gateway, bench_hop
from integration.bench_fetch import Fetched, Store
from integration.bench_gateway import Figures, Throughput
from integration.clients import environments
from paraserve_backend.errors import ParaServeError

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
