"""How far a simulation is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from paraserve_scheduler.simulator.results import RunProgress

#: Seconds between two reports: of a bar, and of lines, which stay.
_BAR_S, _LINE_S = 0.2, 1.5


@contextlib.contextmanager
def shown(
    console: Console, *, with_lines: bool, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[RunProgress], None]]:
    """Yield what takes the progress of a run and shows it; the bar goes when the run has ended.

    Args:
        with_lines: print lines where the console is no terminal; else nothing is shown there.
        clock: seconds since any time.
    """
    if not console.is_terminal:
        yield _Paced(lambda text, _: _print(console, text) if with_lines else None, _LINE_S, clock)
        return
    columns = (BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("simulating")

        def draw(text: str, progress: RunProgress) -> None:
            total, done = progress.num_requests, progress.num_done
            bar.update(task, total=total, completed=done, description=text, refresh=True)

        yield _Paced(draw, _BAR_S, clock)


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


class _Paced:
    """Shows a progress if the last one was shown a while ago."""

    def __init__(
        self,
        show: Callable[[str, RunProgress], None],
        interval_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._show = show
        self._interval_s = interval_s
        self._clock = clock
        self._begun_s = self._shown_s = clock()

    def __call__(self, progress: RunProgress) -> None:
        now_s = self._clock()
        if now_s - self._shown_s >= self._interval_s:
            self._shown_s = now_s
            self._show(described(progress, now_s - self._begun_s), progress)


def described(progress: RunProgress, took_s: float) -> str:
    """Say how far a run is after `took_s` seconds, and guess the rest by its mean pace."""
    rate = progress.num_done / took_s
    text = f"{progress.num_done} of {progress.num_requests} requests, {rate:.0f}/s"
    if not rate:
        return text
    left_s = (progress.num_requests - progress.num_done) / rate
    return f"{text}, about {left_s:.0f} s left"
