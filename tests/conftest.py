from __future__ import annotations

from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

# A busy machine must not fail a property; what is slow shows in the benchmarks.
settings.register_profile("paraserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("paraserve")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip the modules that need torch where it is not installed (`make unit-312`)."""
    report = yield
    if report.failed and "No module named 'torch'" in str(report.longrepr):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, "Skipped: needs torch")
    return report
