from __future__ import annotations

from hypothesis import settings

# A busy machine must not fail a property; what is slow shows in the benchmarks.
settings.register_profile("paraserve", deadline=None)
settings.load_profile("paraserve")
