"""What bench_coldstart's figures must be."""

from __future__ import annotations

from integration.coldstart_summary import Target
from integration.coldstart_variants import VARIANTS

_BY_NAME = {variant.name: variant for variant in VARIANTS}


def over_limit(name: str, most: float) -> Target:
    """The time to first token over the physical limit."""
    variant = _BY_NAME[name]
    return Target(
        name=f"{name} over its limit",
        variants=(name,),
        bound=most,
        is_least=False,
        measure=lambda results: results.ttft_s(name) / results.limit_s(variant),
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


TARGETS: tuple[Target, ...] = (faster("ours-1", "runai", 1.0),)
