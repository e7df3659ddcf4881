"""How many requests of a deployment may wait: one rule for gateways and for the simulator. Pure."""

from __future__ import annotations

#: Of a deployment whose user states no number.
MAX_WAITING = 1000


def may_wait(num_waiting: int, max_waiting: int) -> bool:
    """Return whether one more request may wait where `num_waiting` wait; otherwise it is refused.

    A request waits while its deployment has no ready replica. A request that comes to a full
    replica waits inside that replica, and no limit applies.
    """
    return num_waiting < max_waiting
