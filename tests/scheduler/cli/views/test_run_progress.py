from __future__ import annotations

import io

import pytest
from rich.console import Console

from paraserve_scheduler.cli.views.run_progress import described, shown
from paraserve_scheduler.simulator.results import RunProgress


def _shown(*, is_terminal: bool, with_lines: bool, seconds: float, step_s: float = 0.01) -> str:
    """What a run of 1,000 requests shows that takes so long and reports every `step_s`."""
    now_s = 0.0
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=80)
    with shown(console, with_lines=with_lines, clock=lambda: now_s) as watch:
        for step in range(round(seconds / step_s)):
            now_s = step * step_s
            watch(RunProgress(num_done=round(1000 * now_s / seconds), num_requests=1000))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_line_is_printed_at_least_every_two_seconds() -> None:
    lines = _shown(is_terminal=False, with_lines=True, seconds=20.0).splitlines()
    assert len(lines) >= 10
    assert lines[0] == "75 of 1000 requests, 50/s, about 18 s left"


@pytest.mark.parametrize(("with_lines", "seconds"), [(False, 20.0), (True, 1.0)])
def test_nothing_is_printed_for_who_reads_json_or_of_a_short_run(
    with_lines: bool, seconds: float
) -> None:
    assert _shown(is_terminal=False, with_lines=with_lines, seconds=seconds) == ""


@pytest.mark.parametrize("with_lines", [True, False])
def test_a_terminal_shows_a_bar_whatever_is_printed_to_standard_output(with_lines: bool) -> None:
    text = _shown(is_terminal=True, with_lines=with_lines, seconds=4.0)
    assert " of 1000 requests, 250/s, about 2 s left" in text
    assert "━" in text


def test_before_the_first_request_has_ended_no_time_is_guessed() -> None:
    progress = RunProgress(num_done=0, num_requests=10)
    assert described(progress, 2.0) == "0 of 10 requests, 0/s"
