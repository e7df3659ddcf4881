from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_scheduler.planner.cost import (
    Speed,
    decode_s,
    pipeline_factor,
    prefill_s,
    stage_ready_s,
    uniform_model,
)
from tests.support.fleets import make_method

GB = 10**9


@given(st.integers(1, 60), st.integers(0, 10**9), st.integers(1000, 10**11))
def test_a_models_layers_add_up_to_its_size(layers: int, ends: int, size: int) -> None:
    ends = min(ends, size // 3)
    model = uniform_model("m", size_bytes=size, num_layers=layers, ends_bytes=ends, kv_bytes=0)
    assert model.total_bytes == size
    assert model.bytes_of(0, layers) == size
    assert all(layer > 0 for layer in model.layer_bytes)


def test_a_fetch_hides_behind_the_runtime_or_the_runtime_behind_the_fetch() -> None:
    method = make_method(runtime_s=5, tail_s=1, load_s_per_byte=0.1 / GB)

    def ready(fetch_s: float) -> float:
        return stage_ready_s(
            method, fetch_s=fetch_s, size_bytes=10 * GB, has_slot=False, in_pipeline=False
        )

    assert ready(2) == ready(5) == pytest.approx(7)
    assert ready(9) == pytest.approx(11)


def test_without_overlap_runtime_and_fetch_add_up() -> None:
    method = make_method(runtime_s=5, tail_s=1, load_s_per_byte=0, is_overlapped=False)
    ready = stage_ready_s(method, fetch_s=3, size_bytes=1, has_slot=False, in_pipeline=False)
    assert ready == pytest.approx(9)


def test_a_slot_saves_the_runtime_only_where_slots_exist() -> None:
    slotted = make_method(runtime_s=5, tail_s=0, slot_runtime_s=0.5)
    bare = make_method(runtime_s=5, tail_s=0, slot_runtime_s=None)
    for method, seconds in ((slotted, 0.5), (bare, 5.0)):
        ready = stage_ready_s(method, fetch_s=0, size_bytes=0, has_slot=True, in_pipeline=False)
        assert ready == pytest.approx(seconds)


def test_one_worker_has_factor_one_and_low_ones_slow_a_pipeline_down() -> None:
    assert pipeline_factor(1, 1) == 1
    assert pipeline_factor(4, 4) == 1
    assert pipeline_factor(4, 1) == 3.25
    assert pipeline_factor(2, 1) == 1.5


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 16))
def test_more_full_workers_never_slow_a_pipeline_down(stages: int, full: int, batch: int) -> None:
    full = min(full, stages)
    speed = Speed(prefill_s_per_token=0.001, decode_s=0.04, decode_s_per_sequence=0.001)
    now = decode_s(speed, batch, stages=stages, full=full, hop_s=0.001)
    if full < stages:
        assert decode_s(speed, batch, stages=stages, full=full + 1, hop_s=0.001) < now
    assert prefill_s(speed, 100, stages=stages, full=full, hop_s=0.001) >= 0.1


def test_the_papers_single_worker_starts_follow_from_the_constants() -> None:
    """Figure 7, V100, HydraServe with one worker: 9.91 s (13.5 GB) and 17.39 s (26 GB)."""
    method = make_method(runtime_s=5.54, tail_s=1.87, load_s_per_byte=0.097 / GB)
    for size_gb, measured_s in ((13.48, 9.91), (26.03, 17.39), (16.06, 11.70)):
        predicted = stage_ready_s(
            method,
            fetch_s=size_gb / 2,
            size_bytes=round(size_gb * GB),
            has_slot=False,
            in_pipeline=False,
        )
        assert predicted == pytest.approx(measured_s, rel=0.03)
