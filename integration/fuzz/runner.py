"""Runs cases one after the other and looks for what must not happen: crashes, hangs, 500s, growth.

Cases of all targets take turns in ten rounds, so that the first tenth and the last do the same.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

from integration.fuzz.target import MAX_S, Case, ServerError, Target

ROUNDS = 10
MAX_CPU_S = 2.0
#: Each costs time, and a few say enough.
_MAX_HANGS = 5
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_MAX_SHOWN_CHARACTERS = 3000
_MAX_SHOWN_FINDINGS = 40


class Hang(Exception):
    """One input took more of the processor's time than any may."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    num_inputs: int = 0
    #: Of all targets, by kind: "crashes", "hangs", "http_500".
    findings: Counter[str] = field(default_factory=Counter)
    #: Resident size after each round.
    resident_bytes: list[int] = field(default_factory=list)

    @property
    def rss_growth_mb(self) -> float:
        return round((self.resident_bytes[-1] - self.resident_bytes[0]) / 1e6, 1)


async def fuzz(
    targets: Mapping[Target, int], seed: int, *, after_round: Callable[[], None]
) -> Outcome:
    """Run so many cases of each target; findings are printed with what makes them again."""
    outcome = Outcome()
    with _logged_errors() as logged, _cpu_limit():
        for turn in range(ROUNDS):
            for target, total in targets.items():
                for number in range(total * turn // ROUNDS, total * (turn + 1) // ROUNDS):
                    if outcome.findings["hangs"] >= _MAX_HANGS:
                        break
                    case = target.case(Random(f"{seed} {target.name} {number}"))
                    kind, what = await _try(case, logged)
                    outcome.num_inputs += 1
                    if kind is not None:
                        outcome.findings[kind] += 1
                        _show(outcome, kind, f"seed {seed} {target.name} {number}", what, case)
            after_round()
            gc.collect()
            outcome.resident_bytes.append(_resident_bytes())
    return outcome


async def _try(case: Case, logged: list[str]) -> tuple[str | None, str]:
    """Return the kind of a finding, `None` for none, and what happened."""
    began_s = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    kind, what = None, ""
    try:
        async with asyncio.timeout(2 * MAX_S):
            await case.run()
            # Else a loop that is never idle would keep every limit's timer.
            await asyncio.sleep(0)
    except (Hang, TimeoutError):
        kind, what = "hangs", "it did not end"
    except ServerError as error:
        kind, what = "http_500", str(error)
    except (KeyboardInterrupt, SystemExit, asyncio.CancelledError):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        kind, what = "crashes", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if kind is None and logged:
        kind = "crashes"
    what = " | ".join((what, *logged))
    logged.clear()
    took_s = time.process_time() - began_s
    return ("hangs", f"{took_s:.1f} s {what}") if took_s > MAX_CPU_S else (kind, what)


def _show(outcome: Outcome, kind: str, origin: str, what: str, case: Case) -> None:
    if outcome.findings.total() <= _MAX_SHOWN_FINDINGS:
        sys.stdout.write(f"{kind}: {origin}: {what}\n    {case.shown[:_MAX_SHOWN_CHARACTERS]}\n")


class _Collector(logging.Handler):
    def __init__(self, logged: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._logged = logged

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        # aiohttp's, about a client that has left.
        if isinstance(error, ConnectionResetError):
            return
        self._logged.append(self.format(record))


@contextmanager
def _logged_errors() -> Iterator[list[str]]:
    """Collect what the product's guards and asyncio log: an exception that no answer shows."""
    logged: list[str] = []
    collector = _Collector(logged)
    logging.getLogger().addHandler(collector)
    try:
        yield logged
    finally:
        logging.getLogger().removeHandler(collector)


@contextmanager
def _cpu_limit() -> Iterator[None]:
    def end(_number: int, _frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, before)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
