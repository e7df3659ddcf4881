"""What bench_coldstart's figures must be."""

from __future__ import annotations

from integration.benchmarks.coldstart.summary import Target
from integration.benchmarks.coldstart.variants import VARIANTS

_BY_NAME = {variant.name: variant for variant in VARIANTS}


def over_limit(name: str, most: float) -> Target:
    """The time to first token over the physical limit."""
    variant = _BY_NAME[name]
    return Target(
        name=f"{name} over its limit",
        variants=(name,),
        bound=most,
        is_least=False,
        measure=lambda results: (
            results.ttft_s(name) / (results.transfer_s(variant) + results.forward_s(name))
        ),
    )


def over_transfer(name: str, most: float) -> Target:
    """The time to first token over bytes by summed bandwidth."""
    variant = _BY_NAME[name]
    return Target(
        name=f"{name} over M / sum(B)",
        variants=(name,),
        bound=most,
        is_least=False,
        measure=lambda results: results.ttft_s(name) / results.transfer_s(variant),
    )


def faster(name: str, than: str, least: float) -> Target:
    return Target(
        name=f"{name} faster than {than}",
        variants=(name, than),
        bound=least,
        is_least=True,
        measure=lambda results: results.ttft_s(than) / results.ttft_s(name),
    )


def seconds(name: str, most: float) -> Target:
    return Target(
        name=f"{name}, s",
        variants=(name,),
        bound=most,
        is_least=False,
        measure=lambda results: results.ttft_s(name),
    )


TARGETS: tuple[Target, ...] = (
    *(
        over_limit(name, 1.15)
        for name in (
            "ours-1-slots",
            "ours-2-slots",
            "ours-3-slots",
            "ours-4-slots",
            "ours-4-slots-1gb",
            "ours-8-slots",
        )
    ),
    faster("ours-4-slots", "status-quo", 4.8),
    faster("ours-4-slots-1gb", "status-quo-1gb", 4.8),
    faster("ours-8-slots", "status-quo-half", 8.0),
    over_transfer("mixed-slots", 1.2),
    seconds("memory-1-slots", 0.3),
    seconds("memory-4-slots", 0.3),
    seconds("memory-4-slots-1gb", 0.3),
    faster("ours-1", "runai", 1.0),
    faster("ours-1-slots", "runai", 1.0),
)
