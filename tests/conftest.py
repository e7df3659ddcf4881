from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

from tests.support.proxies import DEAD

# A busy machine must not fail a property; what is slow shows in the benchmarks.
settings.register_profile("paraserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("paraserve")


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that says nothing of proxies, whatever this machine's says."""
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def dead_proxies(no_proxies: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment whose proxies do not answer."""
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, DEAD)


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
