"""Starts, finds and stops a local cluster from outside its supervisor; chooses ports and memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from random import SystemRandom
from typing import IO, Any

from paraserve_backend.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from paraserve_scheduler.local.children import log_tail
from paraserve_scheduler.local.layout import (
    SHM,
    ClusterFiles,
    ClusterLayout,
    NodeLayout,
    RunningCluster,
    check_name,
    read_running,
    state_root,
    sweep,
    to_json,
)
from paraserve_scheduler.local.lock import locked, owner
from paraserve_scheduler.local.ports import PortPicker, is_free

LOOPBACK = "127.0.0.1"
#: Where clients look for a Triton server; the gateway is what they talk to.
TRITON_GRPC_PORT, TRITON_HTTP_PORT = 8001, 8000
#: One replica takes one port per stage; more than enough for a laptop.
_CHANNEL_PORTS = 32
#: What all nodes together may use of the memory that is free at start.
_MEMORY_SHARE = 0.7
_STOP_TIMEOUT_S = 60.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """What the user may say about a local cluster; `None` picks for them."""

    name: str = "default"
    nodes: int = 4
    node_memory_bytes: int | None = None
    with_s3: bool = True
    scheduler_port: int | None = None
    gateway_grpc_port: int | None = None
    gateway_http_port: int | None = None
    s3_port: int | None = None
    #: Each agent's setting; 0: every cold start fetches everything.
    tier_bytes: int | None = None
    #: Each agent's `max_slots`. All nodes share this machine's cores, so that what makes slots
    #: anew takes them from what serves.
    max_slots: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StartStep:
    """One step of a start: `process` was started or became ready."""

    process: str
    is_ready: bool


def files_of(name: str, environ: Mapping[str, str]) -> ClusterFiles:
    """Return where the cluster called `name` has its files, whether it runs or not."""
    return ClusterFiles(state_root(environ) / check_name(name), name)


def find(files: ClusterFiles) -> RunningCluster | None:
    """Return the cluster if it is up and ready."""
    if owner(files.lock) is None or not files.cluster.exists():
        return None
    return read_running(files.cluster)


def make_layout(
    options: UpOptions, files: ClusterFiles, *, available_bytes: int, cores: int
) -> ClusterLayout:
    """Choose ports and memory for a cluster on this machine's loopback address."""
    if options.nodes < 1:
        raise InvalidRequest(f"A cluster needs at least one node, not {options.nodes}.")
    ports = PortPicker(SystemRandom(), lambda port: is_free(LOOPBACK, port))
    memory_bytes = options.node_memory_bytes or int(available_bytes * _MEMORY_SHARE / options.nodes)
    settings = {"max_slots": options.max_slots}
    if options.tier_bytes is not None:
        settings["tier_bytes"] = options.tier_bytes
    return ClusterLayout(
        name=options.name,
        host=LOOPBACK,
        scheduler_port=options.scheduler_port or ports.one(),
        gateway_grpc_port=options.gateway_grpc_port or ports.one(TRITON_GRPC_PORT),
        gateway_http_port=options.gateway_http_port or ports.one(TRITON_HTTP_PORT),
        s3_port=(options.s3_port or ports.one()) if options.with_s3 else None,
        nodes=tuple(
            _node(f"node{number}", ports, memory_bytes, settings)
            for number in range(1, options.nodes + 1)
        ),
        state_dir=files.state_dir,
        compute_threads=max(1, cores // options.nodes),
    )


def up(
    layout: ClusterLayout,
    on_progress: Callable[[StartStep], None],
    *,
    prefix: tuple[str, ...] = (),
) -> RunningCluster:
    """Start a cluster and return when it is ready; after any failure nothing of it is left.

    Args:
        layout: what to start.
        on_progress: called for every process that is started or ready.
        prefix: command that the supervisor is started through.

    Raises:
        AlreadyExists: a cluster of that name runs.
        Unavailable: a process did not start; holds the end of its log.
    """
    if owner(layout.files.lock) is not None:
        raise AlreadyExists(
            f"Cluster '{layout.name}' is up already: use it, or stop it with paraserve down."
        )
    start = _Start(layout)
    try:
        with delayed_signals():
            start.spawn(prefix)
        start.follow(on_progress)
        return read_running(layout.files.cluster)
    except BaseException:
        start.give_up()
        raise
    finally:
        start.close()


def down(files: ClusterFiles, *, delete: bool = False) -> bool:
    """Stop a cluster if it runs and clean up after one that was killed; returns whether it ran.

    Args:
        files: the cluster's.
        delete: also remove its buckets, deployments and logs.

    Raises:
        DeadlineExceeded: it did not stop in time.
    """
    supervisor = owner(files.lock)
    if supervisor is not None:
        os.kill(supervisor, signal.SIGTERM)
        _wait_for_end(files)
    if files.state_dir.exists():
        with locked(files.lock) as is_ours:
            if is_ours:
                sweep(SHM, files.shm_prefix)
                files.cluster.unlink(missing_ok=True)
                if delete:
                    shutil.rmtree(files.state_dir)
    return supervisor is not None


@contextmanager
def delayed_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the body has done."""
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda got, _: caught.append(got)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    for received in caught:
        signal.raise_signal(received)


class _Start:
    """A start under way: the pipes to and from the supervisor.

    The supervisor gives up when its stdin is closed, and its stdout is closed when it has ended,
    so no signal and no process id are needed here.
    """

    def __init__(self, layout: ClusterLayout) -> None:
        self._layout = layout
        self._stdin: IO[bytes] | None = None
        self._stdout: IO[bytes] | None = None
        self._supervisor: int | None = None

    def spawn(self, prefix: tuple[str, ...]) -> None:
        files = self._layout.files
        files.logs.mkdir(parents=True, exist_ok=True)
        command = (*prefix, sys.executable, "-m", "paraserve_scheduler.local.supervisor")
        with (files.logs / "supervisor.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self._stdin, self._stdout = process.stdin, process.stdout
        assert process.stdin is not None
        process.stdin.write(to_json(self._layout) + b"\n")
        process.stdin.flush()
        process.wait()  # it goes on as a grandchild, which this process need not reap

    def follow(self, on_progress: Callable[[StartStep], None]) -> None:
        for report in self._reports():
            match report["event"]:
                case "owner":
                    continue
                case "up":
                    return
                case "failed":
                    raise Unavailable(report["message"])
                case state:
                    on_progress(StartStep(process=report["process"], is_ready=state == "ready"))
        log = self._layout.files.logs / "supervisor.log"
        raise Unavailable(
            f"The cluster's supervisor ended unexpectedly; the end of its log ({log}):\n"
            f"{log_tail(log)}"
        )

    def give_up(self) -> None:
        """End what was started, however far it is."""
        if self._stdin is not None:
            self._stdin.close()
        for _ in self._reports():
            pass  # until the supervisor has ended, or is up and says no more
        files = self._layout.files
        if self._supervisor is not None and self._supervisor == owner(files.lock):
            down(files)

    def _reports(self) -> Iterator[dict[str, Any]]:
        for line in self._stdout or ():
            report = json.loads(line)
            if report["event"] == "owner":
                self._supervisor = report["pid"]
            yield report

    def close(self) -> None:
        for pipe in (self._stdin, self._stdout):
            if pipe is not None:
                pipe.close()


def require_running(name: str, environ: Mapping[str, str]) -> RunningCluster:
    """Return the cluster called `name`.

    Raises:
        NotFound: it is not up.
    """
    cluster = find(files_of(name, environ))
    if cluster is None:
        raise NotFound(
            f"No local cluster '{name}' is up: run paraserve up, or name a scheduler with "
            "--scheduler or PARASERVE_SCHEDULER."
        )
    return cluster


def _node(
    name: str, ports: PortPicker, memory_bytes: int, agent_settings: Mapping[str, object]
) -> NodeLayout:
    channel = ports.block(_CHANNEL_PORTS)
    return NodeLayout(
        name=name,
        host=LOOPBACK,
        triton_grpc_port=ports.one(),
        triton_http_port=ports.one(),
        triton_metrics_port=ports.one(),
        agent_port=ports.one(),
        channel_port_start=channel,
        channel_port_end=channel + _CHANNEL_PORTS,
        memory_bytes=memory_bytes,
        nic_bytes_per_s=1.25e9,
        agent_settings=agent_settings,
    )


def _wait_for_end(files: ClusterFiles) -> None:
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while owner(files.lock) is not None:
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"The cluster did not stop within {_STOP_TIMEOUT_S:.0f} s; see {files.logs}."
            )
        time.sleep(_POLL_S)
