from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.telemetry.spans import Span, SpanName
from paraserve_scheduler.state.events import DemandReported, PartReported
from paraserve_scheduler.state.learned import Calibration, DemandHistory, stage_times
from paraserve_scheduler.state.records import PartState, Phase
from tests.support.histories import History
from tests.support.scheduler_records import make_demand, make_node_info

_MB = 1_000_000


def _spans(
    *, fetch_s: float, process_s: float, ready_s: float, load: SpanName = SpanName.LOAD
) -> list[Span]:
    return [
        Span(name=SpanName.FETCH, start_s=100.0, end_s=100 + fetch_s),
        Span(name=load, detail="tiny.1", start_s=100.1, end_s=100 + ready_s),
        Span(name=SpanName.ADOPT_WEIGHTS, start_s=100 + process_s, end_s=100 + ready_s),
    ]


def test_a_stages_times_count_from_its_first_span() -> None:
    times = stage_times(_spans(fetch_s=2.0, process_s=1.5, ready_s=2.4), 100 * _MB)
    assert times.runtime_s == pytest.approx(1.5)
    assert times.fetch_s == pytest.approx(2.0)
    assert times.ready_s == pytest.approx(2.4)
    assert times.bytes_per_s == pytest.approx(50 * _MB)
    assert not times.used_slot


def test_a_small_fetch_says_nothing_about_bandwidth() -> None:
    assert stage_times(_spans(fetch_s=2, process_s=1, ready_s=3), _MB).bytes_per_s is None


def test_a_fetch_that_had_help_says_nothing_about_the_network() -> None:
    helped = Span(
        name=SpanName.FETCH_FROM, detail="peers", start_s=100.0, end_s=101.0, size_bytes=_MB
    )
    spans = [*_spans(fetch_s=2, process_s=1, ready_s=3), helped]
    assert stage_times(spans, 100 * _MB).bytes_per_s is None


def test_of_nothing_nothing_is_known() -> None:
    times = stage_times([], 0)
    assert (times.runtime_s, times.fetch_s, times.ready_s) == (None, None, None)


def test_a_measurement_counts_a_third_after_the_first() -> None:
    known = Calibration().with_tail(3.0)
    assert known.tail_s == 3.0
    assert known.with_tail(6.0).tail_s == pytest.approx(4.0)


def _started(load: SpanName = SpanName.LOAD) -> History:
    """A replica of one stage whose start is told as measured on a node of kind "k"."""
    history = History(nodes=[make_node_info("n0", kind="k")])
    history.demand(waiting=1)
    history.decides()
    history.passes(4)
    part = PartState(
        replica="tiny.1",
        stage=0,
        phase=Phase.READY,
        spans=tuple(_spans(fetch_s=2.0, process_s=3.0, ready_s=3.5, load=load)),
        fetched_bytes=100 * _MB,
    )
    history.happens(PartReported(part=part, at_s=history.now_s))
    return history


def test_a_cold_start_corrects_the_constants_of_its_kind_of_node() -> None:
    view = _started().view
    known = view.calibrations["k"]
    assert known.runtime_s == pytest.approx(3.0)
    assert known.tail_s == pytest.approx(1.0), "it was ready 4 s after its plan"
    assert view.nodes["n0"].fetch_bytes_per_s == pytest.approx(50 * _MB)


def test_the_next_prediction_reckons_with_them() -> None:
    history = _started()
    history.demand()
    history.passes(60)
    history.decides()
    history.demand(waiting=1)
    history.decides()
    prediction = history.view.replicas["tiny.2"].prediction
    assert prediction is not None
    assert prediction.ready_s == pytest.approx(4.0)


def test_a_process_from_a_slot_says_nothing_about_a_fresh_one() -> None:
    known = _started(SpanName.BIND).view.calibrations["k"]
    assert known.runtime_s is None
    assert known.slot_runtime_s == pytest.approx(3.0)


def test_a_time_per_token_that_was_twice_the_predicted_doubles_the_next_prediction() -> None:
    history = _started()
    predicted = history.view.replicas["tiny.1"].prediction
    assert predicted is not None
    demand = replace(make_demand(), tpot_s={"tiny.1": 2 * predicted.tpot_s})
    history.happens(DemandReported(gateway="g0", demands=(demand,), at_s=history.now_s))
    history.passes(60)
    history.decides()
    history.demand(waiting=1)
    history.decides()
    second = history.view.replicas["tiny.2"].prediction
    assert second is not None
    assert second.tpot_s == pytest.approx(2 * predicted.tpot_s)


def test_the_first_token_of_a_start_is_what_the_next_one_is_expected_to_take() -> None:
    history = _started()
    ready_s = history.view.replicas["tiny.1"].ready_s
    assert ready_s is not None
    demand = replace(make_demand(), first_token_s={"tiny.1": ready_s + 0.7})
    history.happens(DemandReported(gateway="g0", demands=(demand,), at_s=history.now_s))
    history.passes(60)
    history.decides()
    history.demand(waiting=1)
    history.decides()
    second = history.view.replicas["tiny.2"].prediction
    assert second is not None
    assert second.ttft_s - second.ready_s == pytest.approx(0.7)


# ---- demand ----


def test_before_a_request_has_ended_nothing_is_known_of_its_duration() -> None:
    history = DemandHistory().after(arrived=2, completed=0, running=0, elapsed_s=1.0, at_s=10.0)
    assert history.arrivals_s == (10.0, 10.0)
    assert history.service_s is None


@given(st.integers(1, 20), st.floats(0.1, 30))
def test_steady_demand_shows_how_long_a_request_runs(running: int, service_s: float) -> None:
    # With n requests running for s seconds each, n / s of them end every second.
    history = DemandHistory()
    for second in range(50):
        history = history.after(
            arrived=1, completed=running, running=running, elapsed_s=service_s, at_s=second
        )
    assert history.service_s == pytest.approx(service_s)


def test_only_the_last_arrivals_are_kept() -> None:
    history = DemandHistory()
    for second in range(100):
        history = history.after(arrived=1, completed=0, running=0, elapsed_s=1.0, at_s=second)
    assert history.arrivals_s == tuple(range(68, 100))


def test_reports_of_gateways_make_it() -> None:
    history = History()
    history.demand(waiting=1, arrived=1)
    history.decides()
    history.becomes_ready("tiny.1")
    history.demand(in_flight=1, arrived=1)
    history.passes(4)
    history.demand(arrived=1)
    state = history.view.deployments["tiny"]
    assert len(state.history.arrivals_s) == 1
    assert state.history.service_s == pytest.approx(4)
