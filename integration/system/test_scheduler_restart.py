"""A scheduler that is killed and comes back in the middle of a consolidation.

Gateway and scheduler are processes of their own here, as in production.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from integration.support.bucket import upload
from integration.support.limits import PATIENT_SCHEDULER
from integration.support.steady_load import (
    MAX_TOKENS,
    MODEL,
    PROMPTS,
    deployed,
    load,
    replicas,
    serving,
    wait_until_gone,
)
from integration.support.tiny_cluster import (
    TinyCluster,
    assert_nothing_left,
    pids,
    wait_until,
    write_models,
)
from paraserve_backend.errors import Unavailable
from paraserve_backend.machine.memory import available_bytes
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.client.scheduler import SchedulerClient
from paraserve_scheduler.local.cluster import (
    UpOptions,
    down,
    files_of,
    make_layout,
    up,
)
from paraserve_scheduler.local.layout import ClusterLayout
from tests.support.ports import free_ports

PARASERVE = str(Path(sys.executable).with_name("paraserve"))


def _answers(cluster: TinyCluster, name: str) -> bool:
    """Whether a scheduler listens again, and knows the deployment."""
    try:
        return bool(cluster.client.status(name).deployments)
    except Unavailable:
        return False


@contextmanager
def gateway(layout: ClusterLayout) -> Iterator[ClusterLayout]:
    """Run another gateway of this cluster; returns a layout whose gateway it is."""
    grpc_port, http_port = free_ports(2)
    process = subprocess.Popen(
        [
            PARASERVE,
            "gateway",
            f"--scheduler-address={layout.scheduler_address}",
            f"--grpc-address=127.0.0.1:{grpc_port}",
            f"--http-address=127.0.0.1:{http_port}",
            f"--token-file={layout.files.token}",
        ]
    )
    try:
        yield replace(layout, gateway_grpc_port=grpc_port, gateway_http_port=http_port)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[TinyCluster]:
    """A cluster of two nodes behind a gateway that outlives its scheduler."""
    environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    files = files_of("restart", environ)
    layout = make_layout(
        UpOptions(name="restart", nodes=2),
        files,
        available_bytes=available_bytes(Path("/proc")),
        cores=os.cpu_count() or 1,
    )
    layout = replace(layout, scheduler_settings=PATIENT_SCHEDULER)
    models, folders = write_models(tmp_path / "models")
    try:
        up(layout, lambda _step: None)
        source = upload(layout, folders[MODEL], MODEL, Console(quiet=True))
        token = files.token.read_text(encoding="utf-8")
        with gateway(layout) as seen, SchedulerClient(layout.scheduler_address, token) as client:
            yield TinyCluster(layout=seen, client=client, models=models, sources={MODEL: source})
    finally:
        down(files, delete=True)


@pytest.mark.parametrize("moment", ["the full instance loads", "it takes over"])
def test_a_scheduler_that_restarts_meanwhile_finishes_what_was_begun(
    apart: TinyCluster, moment: str
) -> None:
    expected = [apart.models[MODEL].greedy(prompt, MAX_TOKENS) for prompt in PROMPTS]
    with (
        deployed(apart, "kept", max_stages=2) as name,
        load(apart, name, expected, 4) as running,
    ):
        wait_until(lambda: f"{name}.2" in replicas(apart, name))
        if moment == "it takes over":
            wait_until(lambda: replicas(apart, name)[f"{name}.2"].phase == pb.READY)
        killed = pids(apart.layout.files)["scheduler"]
        os.kill(killed, signal.SIGKILL)
        answered = len(running.answers)
        wait_until(lambda: len(running.answers) > answered + 4)
        wait_until(lambda: pids(apart.layout.files)["scheduler"] != killed)
        wait_until(lambda: _answers(apart, name))
        wait_until_gone(apart, name, f"{name}.1")
        assert [len(replica.parts) for replica in serving(apart, name)] == [1]
        assert_nothing_left(apart, f"{name}.1")
