"""Grouped bars as SVG text, for the docs."""

from __future__ import annotations

from collections.abc import Mapping

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 720, 300, 40, 40, 40
_COLOURS = ("#0b6e4f", "#b0b0b0", "#8096b8", "#c77d3b", "#8c4a1f", "#222222")


def bars(
    title: str,
    groups: Mapping[str, Mapping[str, float]],
    marks: Mapping[str, Mapping[str, float]],
) -> str:
    """Values from 0 to 100 by group and series, with a line across a bar where a mark is given."""
    names = list(next(iter(groups.values())))
    group_width = (_WIDTH - _LEFT) / len(groups)
    width = group_width * 0.85 / len(names)
    parts = [_text(_WIDTH / 2, 16, title, "middle"), *_axis(), *_legend(names)]
    for group_index, (group, values) in enumerate(groups.items()):
        left = _LEFT + group_index * group_width
        parts.append(_text(left + group_width * 0.425, _HEIGHT - 22, group, "middle"))
        for index, name in enumerate(names):
            x = left + index * width
            parts.append(_bar(x, width * 0.9, values[name], _COLOURS[index % len(_COLOURS)]))
            mark = marks.get(group, {}).get(name)
            if mark is not None:
                parts.append(_line(x, _y(mark), x + width * 0.9, _y(mark), "#d00000", 2))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif" font-size="11">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _y(value: float) -> float:
    return _HEIGHT - _BOTTOM - value / 100 * (_HEIGHT - _TOP - _BOTTOM)


def _axis() -> list[str]:
    lines = []
    for value in (0, 25, 50, 75, 100):
        lines.append(_line(_LEFT, _y(value), _WIDTH, _y(value), "#dddddd", 1))
        lines.append(_text(_LEFT - 6, _y(value) + 4, str(value), "end"))
    return lines


def _legend(names: list[str]) -> list[str]:
    parts = []
    step = (_WIDTH - _LEFT) / len(names)
    for index, name in enumerate(names):
        x = _LEFT + index * step
        colour = _COLOURS[index % len(_COLOURS)]
        parts.append(f'<rect x="{x:.1f}" y="{_HEIGHT - 12}" width="9" height="9" fill="{colour}"/>')
        parts.append(_text(x + 13, _HEIGHT - 4, name, "start"))
    return parts


def _bar(x: float, width: float, value: float, colour: str) -> str:
    height = _y(0) - _y(value)
    return (
        f'<rect x="{x:.1f}" y="{_y(value):.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{colour}"/>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: int) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
