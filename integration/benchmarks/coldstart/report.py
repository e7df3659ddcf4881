"""The tables of bench_coldstart, for the terminal and for the docs. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from integration.benchmarks.coldstart.summary import Results
from integration.benchmarks.coldstart.variants import Variant

_TEXT_HEADINGS = ("", "GB", "from")
_FIGURE_HEADINGS = ("nodes", "s", "limit", "×", "faster", "MB")


def table(results: Results) -> Table:
    """Return a row per variant, under the name of its testbed."""
    drawn = Table(
        title="Time to first token from zero: medians, the physical limit, what is how many times "
        "the limit, how many times faster than the status quo",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in _TEXT_HEADINGS:
        drawn.add_column(heading)
    for heading in _FIGURE_HEADINGS:
        drawn.add_column(heading, justify="right")
    for testbed, variants in groupby(results.variants, key=lambda it: it.testbed.name):
        drawn.add_row(f"[bold]{testbed}[/]")
        for variant in variants:
            drawn.add_row(*_row(results, variant))
    return drawn


def markdown(results: Results, last_line: Mapping[str, Any]) -> str:
    """Return the same as a page, with the ablation and the targets of the last line."""
    return "\n".join(
        [
            "# Cold starts: one run",
            "",
            f"Medians of {last_line['rounds']} rounds of `make bench-coldstart`. How it is done: "
            "[benchmarks](../benchmarks.md#cold-starts).",
            "",
            "![Time to first token](bench-coldstart.svg)",
            "",
            *_lines(("cluster", *_TEXT_HEADINGS, *_FIGURE_HEADINGS), _rows(results)),
            "",
            "s: request to first token. limit: bytes over the summed rate of the links, measured, "
            "and one forward pass. ×: s over limit. faster: than the status quo. MB: largest "
            "model process.",
            "",
            *_lines(("step", "s"), last_line["ablation_ttft_s"].items()),
            "",
            *_lines(("figure", "is", "target", ""), _judged(last_line)),
            "",
        ]
    )


def _rows(results: Results) -> Iterator[tuple[str, ...]]:
    for variant in results.variants:
        yield (variant.testbed.name, *_row(results, variant))


def _judged(last_line: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, value in last_line["figures"].items():
        verdict = "**missed**" if name in last_line["missed"] else "met"
        yield name, f"{value:.2f}", f"{last_line['targets'][name]:g}", verdict


def _lines(headings: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield "|---" * len(headings) + "|"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def _row(results: Results, variant: Variant) -> tuple[str, ...]:
    peak_bytes = max(start.peak_bytes for start in results.of(variant.name))
    return (
        variant.label,
        variant.checkpoint.removesuffix("gb"),
        variant.weights,
        str(variant.nodes),
        f"{results.ttft_s(variant.name):.2f}",
        _known(results.limit_s(variant), 2),
        _known(results.over_limit(variant), 2),
        _known(results.speedup(variant), 1),
        f"{peak_bytes / 1e6:.0f}",
    )


def _known(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
