"""Judges which processes are alive but do nothing, by what the watchdog saw in look after look.

Pure. A slow machine must not make a process look dead. So a stop is what the kernel says of a
process, and a silence counts only looks that were on time: a machine too slow for the agent's own
looks proves nothing about others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Generic, TypeVar

#: A look is late if it comes more than this many intervals after the one before.
_LATE = 2.0
#: A process that is stopped for one look may be going on already.
_STOPPED_LOOKS = 2
#: One answer that is late may be so because the whole machine stood still.
_MISSED_ANSWERS = 2

Subject = TypeVar("Subject")


class Punctuality:
    """Whether looks come as often as they should. Times are monotonic."""

    def __init__(self, interval_s: float) -> None:
        self._late_s = _LATE * interval_s
        self._last_s: float | None = None
        #: Looks that came late so far.
        self.num_late = 0

    def look(self, now_s: float) -> bool:
        """Note a look; returns whether it came on time after the one before."""
        on_time = not self.is_overdue(now_s)
        self.num_late += not on_time
        self._last_s = now_s
        return on_time

    def is_overdue(self, now_s: float) -> bool:
        """Whether a look that came now would be late."""
        return self._last_s is not None and now_s - self._last_s > self._late_s


class Stops(Generic[Subject]):
    """Who is stopped in two looks in a row."""

    def __init__(self) -> None:
        self._looks: dict[Subject, int] = {}

    def after(self, stopped: frozenset[Subject]) -> frozenset[Subject]:
        """Return who is to be taken as gone, once another look has found these stopped."""
        self._looks = {subject: self._looks.get(subject, 0) + 1 for subject in stopped}
        return frozenset(
            subject for subject, looks in self._looks.items() if looks >= _STOPPED_LOOKS
        )


class Standstills(Generic[Subject]):
    """Finds the subjects whose state stayed the same in punctual looks for `limit_s`."""

    def __init__(self, *, interval_s: float, limit_s: float) -> None:
        self._looks = math.ceil(limit_s / interval_s)
        self._states: Mapping[Subject, int] = {}
        #: Looks in a row that found the same state as the one before.
        self._unchanged: dict[Subject, int] = {}

    def after(self, states: Mapping[Subject, int], *, on_time: bool) -> frozenset[Subject]:
        """Return who stands still, once another look has found these states."""
        self._unchanged = {
            subject: self._unchanged.get(subject, 0) + 1
            for subject, state in states.items()
            if on_time and self._states.get(subject) == state
        }
        self._states = states
        return frozenset(
            subject for subject, looks in self._unchanged.items() if looks >= self._looks
        )


class Answers:
    """Whether Triton is live, by its answers to that question."""

    def __init__(self) -> None:
        #: `None` before the first answer.
        self.live: bool | None = None
        self._missed = 0

    def after(self, answer: bool | None, *, on_time: bool) -> bool | None:
        """Return whether it is live, after an answer or none; none counts if we were on time."""
        if answer is not None:
            self._missed = 0
            self.live = answer
        elif not on_time:
            self._missed = 0
        else:
            self._missed += 1
            if self._missed >= _MISSED_ANSWERS:
                self.live = False
        return self.live
