"""The last line of bench_tier, without running it."""

from __future__ import annotations

import pytest

from integration.benchmarks.tier.run import Read, summary

_SIZE_BYTES = 1_000_000_000
_RATES = {
    "direct": 2.0,
    "disk_tier": 1.7,
    "disk_to_tensors": 1.0,
    "load_file_disk": 1.0,
    "memory_tier": 10.0,
    "load_file_memory": 10.0,
    "stage": 5.0,
}


def reads(rates: dict[str, float], *, stage_peak_bytes: int = 1_450_000_000) -> dict[str, object]:
    return summary(
        {
            way: [
                Read(
                    gb_per_s=rate,
                    cpu_s_per_gb=0.5,
                    base_bytes=300_000_000,
                    peak_bytes=stage_peak_bytes,
                )
            ]
            for way, rate in rates.items()
        },
        _SIZE_BYTES,
    )


def test_figures_at_their_targets_meet_them() -> None:
    assert reads(_RATES)["missed"] == []


@pytest.mark.parametrize("way", ["disk_tier", "disk_to_tensors", "memory_tier"])
def test_a_slow_tier_is_named(way: str) -> None:
    assert reads({**_RATES, way: 0.9})["missed"] == [way]


def test_the_best_of_the_other_loaders_is_the_target() -> None:
    assert reads({**_RATES, "fastsafetensors_disk": 1.1})["missed"] == ["disk_to_tensors"]


def test_a_stage_that_takes_too_much_memory_is_named() -> None:
    assert reads(_RATES, stage_peak_bytes=1_460_000_000)["missed"] == ["stage_peak_mb"]
