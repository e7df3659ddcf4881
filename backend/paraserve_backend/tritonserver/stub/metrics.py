"""The state of the generate loop as Prometheus gauges on Triton's metrics endpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import triton_python_backend_utils as pb_utils

from paraserve_backend.engines.base import LoopState
from paraserve_backend.protocol.parameters import (
    GenerateConfig,
)

#: Name (after the prefix `paraserve_`) to description.
GAUGES = {
    "requests_running": "Requests that take part in forward passes.",
    "requests_waiting": "Requests that wait for KV blocks or a place in the batch.",
    "kv_blocks_used": "KV cache blocks owned by running requests.",
    "requests_moved": "Requests handed over to another replica with their KV cache.",
    "kv_blocks_sent_ahead": "KV cache blocks sent for them while they were decoded.",
    "kv_blocks_sent_held": "KV cache blocks sent for them while they waited.",
}
#: Setting one is a round trip to the server process (about 0.1 ms), so not on every token.
_INTERVAL_S = 0.1


class RateLimitedGauges:
    """Sets gauges at most every 0.1 s, but always when the loop falls idle."""

    def __init__(self, setters: Mapping[str, Callable[[float], None]]) -> None:
        self._setters = setters
        self._last: dict[str, float] = {}
        self._next_s = 0.0
        self.update(LoopState())

    def update(self, state: LoopState) -> None:
        now_s = time.monotonic()
        if state.running + state.waiting > 0 and now_s < self._next_s:
            return
        self._next_s = now_s + _INTERVAL_S
        values = {
            "requests_running": state.running,
            "requests_waiting": state.waiting,
            "kv_blocks_used": state.kv_blocks_used,
            "requests_moved": state.requests_moved,
            "kv_blocks_sent_ahead": state.kv_blocks_sent_ahead,
            "kv_blocks_sent_held": state.kv_blocks_sent_held,
        }
        for name, value in values.items():
            if self._last.get(name) != value:
                self._setters[name](value)
                self._last[name] = value


def triton_gauges(config: GenerateConfig) -> RateLimitedGauges:
    labels = {"deployment": config.deployment, "replica": config.replica}
    setters = {}
    for name, description in GAUGES.items():
        family = pb_utils.MetricFamily(
            name=f"paraserve_{name}", description=description, kind=pb_utils.MetricFamily.GAUGE
        )
        # Kept with its setter: a family that is collected takes its metrics along.
        metric = family.Metric(labels=labels)
        setters[name] = partial(_set_metric, family, metric)
    return RateLimitedGauges(setters)


def _set_metric(_family: pb_utils.MetricFamily, metric: pb_utils.Metric, value: float) -> None:
    metric.set(value)
