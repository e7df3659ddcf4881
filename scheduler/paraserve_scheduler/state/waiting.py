"""How many requests of a deployment may wait: one rule for gateways and for the simulator. Pure."""

from __future__ import annotations

#: Of a deployment whose user states no number.
MAX_WAITING = 1000


def may_wait(num_waiting: int, max_waiting: int) -> bool:
    """Return whether one more request may wait where `num_waiting` wait; otherwise it is refused.

    It is asked of a request that no replica takes: none is ready, or each has as many requests as
    one gateway may give it (`Endpoint.max_ongoing`). Beyond the places of its batch a replica lets
    requests wait inside itself, up to that number. The simulator's replicas have no such number,
    so there a request waits only while none is ready.
    """
    return num_waiting < max_waiting
