from __future__ import annotations

from hypothesis import HealthCheck, settings

# A busy machine must not fail a property; what is slow shows in the benchmarks.
settings.register_profile("paraserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("paraserve")
