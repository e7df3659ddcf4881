from __future__ import annotations

from statistics import median

import pytest

from integration.experiments.paper_charts import bars
from integration.experiments.paper_cold_starts import cold_ttfts
from integration.experiments.paper_numbers import ATTAINMENT, COLD_TTFT_S
from integration.experiments.simulate_paper import (
    TESTBED,
    Run,
    attainment,
    run_cell,
    verdict,
)
from paraserve_backend.daemon.settings import load_config
from paraserve_scheduler.policies.registry import POLICIES
from paraserve_scheduler.simulator.description import ClusterFile

FILE = load_config(ClusterFile, TESTBED)


def test_the_committed_constants_give_the_papers_cold_starts() -> None:
    simulated = cold_ttfts(FILE)
    errors = [
        abs(simulated[gpu][system][model] - seconds) / seconds
        for gpu, systems in COLD_TTFT_S.items()
        for system, measured in systems.items()
        for model, seconds in measured.items()
    ]
    assert len(errors) == 60
    assert median(errors) < 0.03
    assert max(errors) < 0.14


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    """One seed of one cell under every policy, as if it were all of them."""
    policies = POLICIES.values()
    found = [run_cell(FILE, policy, 8, 0.6, 1) for policy in policies]
    return [
        Run(policy=run.policy, cv=cv, rate=rate, seed=1, summary=run.summary)
        for run in found
        for cv in (2, 4, 8)
        for rate in (0.6, 0.7, 0.8)
    ]


def test_policies_rank_as_they_do_in_the_paper_and_ours_is_ahead(runs: list[Run]) -> None:
    order = ["serverless-vllm", "serverlessllm", "hydraserve", "hydraserve-cache", "paraserve"]
    values = [attainment(runs, (name, 8, 0.6))[0] for name in order]
    assert values == sorted(values)
    assert values[-1] > 95
    assert attainment(runs, ("oracle", 8, 0.6))[0] >= values[-1]


def test_the_verdict_names_every_number_to_reach(runs: list[Run]) -> None:
    found = verdict(runs)
    assert found["cells_ahead_of_every_baseline"] == 9
    assert found["applications_ahead"] == 3
    assert found["cost_over_hydraserve"] < 1
    assert found["over_serverless_vllm"] > 1.74


def test_a_chart_has_a_bar_for_every_value_and_a_line_for_every_mark() -> None:
    groups = {"a": {"x": 50.0, "y": 100.0}, "b": {"x": 0.0, "y": 25.0}}
    chart = bars("title", groups, {"a": {"x": 40.0}})
    assert chart.count("<rect") == 4 + 2, "and one each in the legend"
    assert chart.count('stroke="#d00000"') == 1


def test_every_baseline_has_its_nine_measured_cells() -> None:
    assert set(ATTAINMENT) < set(POLICIES)
    assert {len(cells) for by_cv in ATTAINMENT.values() for cells in by_cv.values()} == {3}
