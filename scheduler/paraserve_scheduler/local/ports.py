"""Picks free TCP ports for a local cluster.

Only below the range that the kernel gives to outgoing connections: otherwise a client of ours could
take a port between its choice and its use.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from random import Random

from paraserve_backend.errors import Unavailable

#: Ports [start, end) that are tried.
RANGE = (10_000, 32_000)
_ATTEMPTS = 200


def is_free(host: str, port: int) -> bool:
    """Whether nobody listens there; connections of a server that has ended do not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


class PortPicker:
    """Gives out ports that are free now and that it has not given out before."""

    def __init__(self, random: Random, is_free: Callable[[int], bool]) -> None:
        self._random = random
        self._is_free = is_free
        self._given: set[int] = set()

    def one(self, wanted: int | None = None) -> int:
        """Return the port that clients expect, if it is free, else any."""
        if wanted is not None and wanted not in self._given and self._is_free(wanted):
            self._given.add(wanted)
            return wanted
        return self.block(1)

    def block(self, count: int) -> int:
        """Return the first of `count` free ports in a row.

        Raises:
            Unavailable: there are none.
        """
        for _ in range(_ATTEMPTS):
            start = self._random.randrange(RANGE[0], RANGE[1] - count)
            ports = range(start, start + count)
            if self._given.isdisjoint(ports) and all(map(self._is_free, ports)):
                self._given.update(ports)
                return start
        raise Unavailable(f"No {count} free ports in a row in {RANGE[0]}-{RANGE[1]}.")
