"""Reads a range completely: bounded retries with back-off, resumed at the byte where it broke."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from paraserve_backend.errors import SourceUnavailable
from paraserve_backend.weights.sources.base import (
    BrokenTransfer,
    Connection,
    Source,
    StoredObject,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Exponential back-off: `base_s`, doubled each time up to `limit_s`, cut by up to a half."""

    attempts: int = 6
    base_s: float = 0.1
    limit_s: float = 5.0

    def delay_s(self, failures: int, rng: random.Random) -> float:
        """Return the pause after the `failures`-th failure in a row, counted from 1."""
        # Jitter keeps the fetches of many nodes from returning to a struggling store together.
        return min(self.limit_s, self.base_s * 2.0 ** (failures - 1)) * rng.uniform(0.5, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrier:
    """How one caller retries; `pause` waits that many seconds, or raises to give up."""

    pause: Callable[[float], None] = time.sleep
    policy: RetryPolicy = RetryPolicy()
    rng: random.Random

    def read(
        self, connection: Connection, stored: StoredObject, start: int, view: memoryview
    ) -> int:
        """Fill `view` with the object's bytes from `start` on; return how often it was retried.

        Raises what `Connection.read_into` raises, with `SourceUnavailable` once the attempts are
        used up.
        """
        landed, reason = 0, ""
        for failures in range(1, self.policy.attempts + 1):
            try:
                connection.read_into(stored, start + landed, view[landed:])
            except BrokenTransfer as broken:
                landed += broken.landed_bytes
                reason = str(broken)
            else:
                return failures - 1
            if failures < self.policy.attempts:
                self.pause(self.policy.delay_s(failures, self.rng))
        raise SourceUnavailable(
            f"could not read {stored.key} after {self.policy.attempts} attempts: {reason}"
        )


def read_range(
    source: Source, stored: StoredObject, start: int = 0, end: int | None = None
) -> bytes:
    """Return bytes `[start, end)` of a small object or of a header; `None` is the object's end."""
    buffer = bytearray((stored.size_bytes if end is None else end) - start)
    if not buffer:
        return b""
    connection = source.connect()
    try:
        Retrier(rng=random.Random()).read(connection, stored, start, memoryview(buffer))
    finally:
        connection.close()
    return bytes(buffer)
