from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from integration.support.bucket import upload
from integration.support.limits import PATIENT_SCHEDULER
from integration.support.logs import log_tails
from integration.support.tiny_cluster import MODELS, TinyCluster, write_models
from paraserve_backend.machine.memory import available_bytes
from paraserve_scheduler.client.scheduler import SchedulerClient
from paraserve_scheduler.local.cluster import (
    UpOptions,
    down,
    files_of,
    make_layout,
    up,
)
from paraserve_scheduler.local.layout import NodeLayout


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """For the tiny models' oracle: more threads only wait for each other, far longer when busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyCluster]:
    """Four nodes that keep nothing of a replica when it is gone."""
    with _running(UpOptions(name="main-path", nodes=4, tier_bytes=0), tmp_path_factory) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def caching_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyCluster]:
    """Two nodes that keep weights in memory, as they do by default."""
    with _running(UpOptions(name="caching", nodes=2), tmp_path_factory) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def slots_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyCluster]:
    """Two nodes that may keep one set of runtime slots each."""
    with _running(UpOptions(name="slots", nodes=2), tmp_path_factory, max_slots=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def disk_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyCluster]:
    """Two nodes that keep weights on disk alone."""
    options = UpOptions(name="disk", nodes=2, tier_bytes=0)
    with _running(options, tmp_path_factory, disk_dir=tmp_path_factory.mktemp("disk")) as cluster:
        yield cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failed test what its clusters' logs say last."""
    report = yield
    if report.failed:
        clusters = (value for value in item.funcargs.values() if isinstance(value, TinyCluster))
        for cluster in clusters:
            report.sections.extend(log_tails(cluster.layout.files))
    return report


@contextmanager
def _running(
    options: UpOptions,
    tmp_path_factory: pytest.TempPathFactory,
    *,
    max_slots: int = 0,
    disk_dir: Path | None = None,
) -> Iterator[TinyCluster]:
    environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path_factory.mktemp("state"))}
    files = files_of(options.name, environ)
    layout = make_layout(
        options,
        files,
        available_bytes=available_bytes(Path("/proc")),
        cores=os.cpu_count() or 1,
    )
    nodes = (
        replace(
            node, agent_settings={**node.agent_settings, **_settings(node, max_slots, disk_dir)}
        )
        for node in layout.nodes
    )
    layout = replace(layout, nodes=tuple(nodes), scheduler_settings=PATIENT_SCHEDULER)
    models, folders = write_models(tmp_path_factory.mktemp("models"))
    try:
        up(layout, lambda _step: None)
        token = files.token.read_text(encoding="utf-8")
        with SchedulerClient(layout.scheduler_address, token) as client:
            quiet = Console(quiet=True)
            sources = {name: upload(layout, folders[name], name, quiet) for name in MODELS}
            yield TinyCluster(layout=layout, client=client, models=models, sources=sources)
    finally:
        down(files, delete=True)


def _settings(node: NodeLayout, max_slots: int, disk_dir: Path | None) -> dict[str, object]:
    if disk_dir is None:
        return {"max_slots": max_slots}
    return {"max_slots": max_slots, "disk_dir": str(disk_dir / node.name), "disk_bytes": 1 << 30}
