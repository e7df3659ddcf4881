"""How long to wait before the next try, whoever it is that did not answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Pauses that double from `base_s` up to `limit_s`, each cut by up to a half."""

    base_s: float = 0.1
    limit_s: float = 2.0

    def pauses(self, rng: random.Random) -> Iterator[float]:
        """Yield the pause in seconds after each failure in a row, without end."""
        pause_s = self.base_s
        while True:
            # Jitter keeps many nodes from returning to a struggling server together.
            yield pause_s * rng.uniform(0.5, 1.0)
            pause_s = min(2 * pause_s, self.limit_s)
