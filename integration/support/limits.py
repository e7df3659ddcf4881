"""How long tests, the demo and benchmarks wait for what must happen on a real cluster.

Only a hang takes so long, also on a machine that has other things to do.
"""

from __future__ import annotations

from typing import Any

HANG_S = 600.0
#: For the scheduler of a test's cluster: no node and no gateway is lost because it was late.
PATIENT_SCHEDULER: dict[str, Any] = {
    "policy": {"node_timeout_s": 30.0, "gateway_timeout_s": 30.0, "recovery_grace_s": 60.0}
}
