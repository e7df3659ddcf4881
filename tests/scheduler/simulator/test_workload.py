from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, pstdev

import pytest

from paraserve_backend.errors import InvalidRequest
from paraserve_scheduler.simulator.workload import (
    Crowd,
    Law,
    Lengths,
    arrivals,
    read_functions_trace,
    read_llm_trace,
)

LAW = Law(rate_per_s=2.0, duration_s=3_000.0, cv=1.0, zipf=1.0)
NAMES = tuple(f"d{i}" for i in range(50))
CROWD = Crowd(names=NAMES, share=1.0, active=20)


def test_the_rate_is_met_exactly_and_times_ascend() -> None:
    drawn = arrivals(LAW, [CROWD], 1)
    assert len(drawn) == pytest.approx(6_000, rel=0.02)
    assert drawn == sorted(drawn)
    assert 0 <= drawn[0][0] <= drawn[-1][0] <= 3_000


def test_the_seed_says_all() -> None:
    assert arrivals(LAW, [CROWD], 1) == arrivals(LAW, [CROWD], 1)
    assert arrivals(LAW, [CROWD], 1) != arrivals(LAW, [CROWD], 2)


def test_popularity_follows_the_law() -> None:
    counts = [
        count for _, count in Counter(name for _, name in arrivals(LAW, [CROWD], 3)).most_common()
    ]
    assert len(counts) == 20, "only the active ones are asked"
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.3)


def test_crowds_get_their_shares() -> None:
    crowds = [
        Crowd(names=("a", "b"), share=0.75, active=2),
        Crowd(names=("c",), share=0.25, active=1),
    ]
    counts = Counter(name for _, name in arrivals(LAW, crowds, 1))
    assert counts["c"] / counts.total() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_gaps_vary_as_the_coefficient_says(cv: float) -> None:
    law = replace(LAW, cv=cv, duration_s=60_000.0)
    times = [time_s for time_s, _ in arrivals(law, [Crowd(names=("a",), share=1.0, active=1)], 1)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    # The last twelfth is thinned away to meet the rate.
    assert pstdev(gaps) / mean(gaps) == pytest.approx(cv, rel=0.15)


def test_thinning_calms_bursts() -> None:
    def variation(kept: float) -> float:
        law = replace(LAW, cv=8.0, kept=kept, duration_s=20_000.0)
        crowd = Crowd(names=("a",), share=1.0, active=1)
        times = [time_s for time_s, _ in arrivals(law, [crowd], 1)]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        return pstdev(gaps) / mean(gaps)

    assert variation(0.02) < variation(0.2) < variation(1.0)


def test_a_trace_begins_in_the_middle_of_things() -> None:
    """Bursts of many deployments do not all begin at zero."""
    law = replace(LAW, cv=8.0, duration_s=4_000.0)
    crowd = Crowd(names=NAMES, share=1.0, active=50)
    counts = Counter(
        int(time_s // 1_000) for seed in range(5) for time_s, _ in arrivals(law, [crowd], seed)
    )
    assert counts[0] / counts.total() == pytest.approx(0.25, abs=0.05)


def test_lengths_have_their_mean_and_limit() -> None:
    generator = random.Random(1)
    lengths = Lengths(mean=200, cv=0.5, most=100_000)
    drawn = [lengths.draw(generator) for _ in range(5_000)]
    assert mean(drawn) == pytest.approx(200, rel=0.03)
    assert max(replace(lengths, most=150).draw(generator) for _ in range(100)) == 150


def _write(folder: Path, *lines: str) -> Path:
    path = folder / "trace.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_azure_llm_trace_is_read(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109",
    )
    first, second = read_llm_trace(path, NAMES, zipf=1.0, seed=1)
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.arrival_s == pytest.approx(4.314579)
    assert {first.deployment, second.deployment} <= set(NAMES)


def test_a_deployment_column_goes_before_the_popularity_law(tmp_path: Path) -> None:
    head = "TIMESTAMP,ContextTokens,GeneratedTokens,Deployment"
    path = _write(tmp_path, head, "2023-11-16 18:15:46,1,2,d7")
    assert read_llm_trace(path, NAMES, zipf=1.0, seed=1)[0].deployment == "d7"
    path = _write(tmp_path, head, "2023-11-16 18:15:46,1,2,nobody")
    with pytest.raises(InvalidRequest, match="line 2: the cluster has no deployment 'nobody'"):
        read_llm_trace(path, NAMES, zipf=1.0, seed=1)


def test_functions_become_deployments_round_robin(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        "app,func,end_timestamp,duration",
        "a,f,12.0,2.0",
        "a,g,11.5,0.5",
        "b,f,31.0,1.0",
        "a,f,40.0,0.0",
    )
    assert read_functions_trace(path, ["x", "y"], compression=10.0) == [
        (0.0, "x"),
        (pytest.approx(0.1), "y"),
        (2.0, "x"),
        (3.0, "x"),
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("TIMESTAMP,ContextTokens", "x,1"), "lacks the column GeneratedTokens"),
        (("TIMESTAMP,ContextTokens,GeneratedTokens", "soon,1,2"), "line 2"),
        (("TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46,many,2"), "line 2"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(
    tmp_path: Path, lines: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_llm_trace(_write(tmp_path, *lines), NAMES, zipf=1.0, seed=1)


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="Cannot read"):
        read_llm_trace(tmp_path / "none.csv", NAMES, zipf=1.0, seed=1)
