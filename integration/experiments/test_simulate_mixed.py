from __future__ import annotations

import pytest

from integration.experiments.simulate_mixed import cold_start, mixes


@pytest.mark.parametrize("model", ["7b", "70b"])
@pytest.mark.parametrize("gbits", [(10, 100), (10, 25, 100), (10, 25, 25, 100)])
@pytest.mark.parametrize("ttft_slo_s", [None, 0.5])
def test_bandwidths_of_mixed_nodes_add_up(
    gbits: tuple[int, ...], model: str, ttft_slo_s: float | None
) -> None:
    start = cold_start(gbits, model, ttft_slo_s, 0.1)
    if ttft_slo_s is None:
        assert sorted(start.used_gbits) == sorted(gbits)
    assert start.ttft_s <= start.limit_s
    assert start.over_bandwidth > 0.8, "hardly anything of the fetch is hidden"


def test_every_mix_has_several_bandwidths() -> None:
    found = list(mixes((2, 3, 4)))
    assert len(found) == len(set(found)) == 22
    assert all(len(set(gbits)) > 1 for gbits in found)
