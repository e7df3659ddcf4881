"""Reads a range completely: bounded retries with back-off, resumed at the byte where it broke."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from paraserve_backend.daemon.retry import Backoff
from paraserve_backend.errors import SourceUnavailable
from paraserve_backend.weights.sources.base import (
    BrokenTransfer,
    Connection,
    Source,
    StoredObject,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a read is tried, and how long to wait in between."""

    attempts: int = 6
    backoff: Backoff = field(default_factory=Backoff)


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
        pauses = self.policy.backoff.pauses(self.rng)
        for failures in range(1, self.policy.attempts + 1):
            try:
                connection.read_into(stored, start + landed, view[landed:])
            except BrokenTransfer as broken:
                landed += broken.landed_bytes
                reason = str(broken)
            else:
                return failures - 1
            if failures < self.policy.attempts:
                self.pause(next(pauses))
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
