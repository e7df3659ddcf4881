"""Waits until this machine has nothing to do, so that one measurement does not disturb the next."""

from __future__ import annotations

import time
from pathlib import Path

_STAT = Path("/proc/stat")
#: Share of the processors' time that idle daemons may take.
_MOST_BUSY = 0.15
_LOOK_S = 0.5


def wait_for_rest(timeout_s: float) -> bool:
    """Return whether the machine came to rest in time; what else runs on it may keep it busy."""
    deadline_s = time.monotonic() + timeout_s
    before = _STAT.read_text()
    while time.monotonic() < deadline_s:
        time.sleep(_LOOK_S)
        now = _STAT.read_text()
        if busy_share(before, now) <= _MOST_BUSY:
            return True
        before = now
    return False


def busy_share(before: str, now: str) -> float:
    """Return the share of time that all processors were busy between two readings of /proc/stat."""
    (total_before, idle_before), (total_now, idle_now) = _ticks(before), _ticks(now)
    total = total_now - total_before
    return 1 - (idle_now - idle_before) / total if total else 0.0


def _ticks(stat: str) -> tuple[int, int]:
    """All time, and that spent idle or waiting for disks; guests' time counts as user time too."""
    user, nice, system, idle, waiting, irq, softirq, steal = map(int, stat.split()[1:9])
    return user + nice + system + idle + waiting + irq + softirq + steal, idle + waiting
