"""The figure of bench_coldstart as SVG: a bar per variant, its range and its physical limit."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape

from integration.benchmarks.coldstart.summary import Results
from integration.benchmarks.coldstart.variants import Variant

_WIDTH, _LEFT, _RIGHT = 760, 330, 60
_ROW, _HEADING, _TOP, _BOTTOM = 18, 24, 40, 30
_OURS, _OTHERS, _LIMIT, _GRID = "#0b6e4f", "#b0b0b0", "#d00000", "#dddddd"
_GRID_LINES = 5


def chart(results: Results) -> str:
    """Return the text of an SVG file."""
    longest_s = max(start.ttft_s for start in results.starts)
    testbeds = list(dict.fromkeys(variant.testbed.name for variant in results.variants))
    bottom = _TOP + len(testbeds) * _HEADING + len(results.variants) * _ROW
    scale = (_WIDTH - _LEFT - _RIGHT) / longest_s
    parts = [
        _text(_WIDTH / 2, 16, "Time to first token from zero, s", "middle"),
        _text(_WIDTH / 2, 31, "bar: median; thin line: range; red: physical limit", "middle"),
        *_grid(longest_s, scale, bottom),
    ]
    y = float(_TOP)
    for testbed in testbeds:
        parts.append(_text(4, y + _HEADING - 7, testbed, "start", weight="bold"))
        y += _HEADING
        for variant in results.variants:
            if variant.testbed.name == testbed:
                parts += _row(results, variant, y, scale)
                y += _ROW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + _BOTTOM}" '
        f'font-family="sans-serif" font-size="11">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _row(results: Results, variant: Variant, y: float, scale: float) -> Iterator[str]:
    ttft_s = results.ttft_s(variant.name)
    seconds = [start.ttft_s for start in results.of(variant.name)]
    colour = _OURS if variant.is_ours else _OTHERS
    limit_s = results.limit_s(variant)
    middle = y + _ROW / 2
    yield _text(_LEFT - 6, middle + 4, _label(variant), "end")
    yield (
        f'<rect x="{_LEFT}" y="{y + 2:.1f}" width="{ttft_s * scale:.1f}" height="{_ROW - 4}" '
        f'fill="{colour}"/>'
    )
    yield _line(_LEFT + min(seconds) * scale, middle, _LEFT + max(seconds) * scale, middle, "#222")
    if limit_s is not None:
        limit = _LEFT + limit_s * scale
        yield _line(limit, y + 1, limit, y + _ROW - 1, _LIMIT)
    end = _LEFT + max(*seconds, limit_s or 0.0) * scale
    yield _text(end + 5, middle + 4, f"{ttft_s:.2f}", "start")


def _label(variant: Variant) -> str:
    nodes = "1 node" if variant.nodes == 1 else f"{variant.nodes} nodes"
    size = variant.checkpoint.removesuffix("gb")
    return f"{variant.label}, {nodes}, {size} GB from {variant.weights}"


def _grid(longest_s: float, scale: float, bottom: float) -> Iterator[str]:
    step_s = max(1, round(longest_s / _GRID_LINES))
    for number in range(int(longest_s / step_s) + 1):
        x = _LEFT + number * step_s * scale
        yield _line(x, _TOP, x, bottom, _GRID)
        yield _text(x, bottom + 14, f"{number * step_s}", "middle")


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, anchor: str, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )
