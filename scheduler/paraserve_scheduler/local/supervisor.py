"""The process that owns a local cluster: starts its processes, restarts those that end, cleans up.

`paraserve up` starts it and reads one JSON object per line from its stdout. During the start,
closing its stdin makes it give up; afterwards only SIGTERM does. One thread starts all processes,
because their lives are tied to it.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import BinaryIO

from paraserve_backend.daemon.logs import start_logging
from paraserve_backend.errors import ParaServeError, Unavailable
from paraserve_backend.tritonserver.host.install import find_triton
from paraserve_scheduler.client.scheduler import SchedulerClient
from paraserve_scheduler.local.children import (
    Child,
    ProcessSpec,
    start,
    stop,
)
from paraserve_scheduler.local.layout import (
    SHM,
    ClusterLayout,
    Process,
    RunningCluster,
    ensure_secrets,
    from_json,
    sweep,
    write_running,
)
from paraserve_scheduler.local.lock import locked
from paraserve_scheduler.local.processes import process_waves, this_machine, write_files

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_WATCH_S = 0.5
#: A process that ends again and again is not started more often than this.
_RESTART_S = 2.0
#: Longest time for one wave of processes to become ready; a cold disk is slow.
_READY_TIMEOUT_S = 120.0
#: An agent unloads its models first, which ends the model processes.
_STOP_GRACE_S = 15.0


class _Stopped(Exception):
    """The cluster shall end."""


class Supervisor:
    def __init__(self, layout: ClusterLayout, wakeup: StopSignal, reporter: Reporter) -> None:
        self._layout = layout
        self._stop_signal = wakeup
        self._reporter = reporter
        self._waves: list[list[Child]] = []

    def run(self) -> None:
        """Start everything, stay until told to stop, leave nothing behind."""
        try:
            self._start()
            self._stay()
        except _Stopped:
            logger.info("stopping cluster name=%s", self._layout.name)
        finally:
            self._clean_up()

    def _start(self) -> None:
        machine = this_machine(find_triton(), os.environ)
        ensure_secrets(self._layout.files)
        sweep(SHM, self._layout.files.shm_prefix)
        write_files(self._layout, machine)
        for specs in process_waves(self._layout, machine):
            self._start_wave(specs)
        self._wait_for_nodes()
        write_running(self._layout.files.cluster, self._running())
        self._reporter.send(event="up")
        self._reporter.close()

    def _start_wave(self, specs: Sequence[ProcessSpec]) -> None:
        wave: list[Child] = []
        self._waves.append(wave)
        for spec in specs:
            spec.log.unlink(missing_ok=True)
            wave.append(start(spec))
            self._reporter.send(event="started", process=spec.name)
        waiting = list(wave)
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while waiting:
            self._stop_signal.check(give_up_with_stdin=True)
            _require_alive(wave)
            waiting = [child for child in waiting if not self._became_ready(child)]
            if time.monotonic() > deadline:
                raise Unavailable(_not_ready(waiting))
            time.sleep(_POLL_S)

    def _became_ready(self, child: Child) -> bool:
        if child.is_ready:
            self._reporter.send(event="ready", process=child.spec.name)
            return True
        return False

    def _wait_for_nodes(self) -> None:
        """Wait until the scheduler sees all nodes alive."""
        token = self._layout.files.token.read_text(encoding="utf-8")
        deadline = time.monotonic() + _READY_TIMEOUT_S
        with SchedulerClient(self._layout.scheduler_address, token) as client:
            while sum(node.alive for node in client.status().nodes) < len(self._layout.nodes):
                self._stop_signal.check(give_up_with_stdin=True)
                _require_alive([child for wave in self._waves for child in wave])
                if time.monotonic() > deadline:
                    raise Unavailable("Not all agents have registered with the scheduler.")
                time.sleep(_POLL_S)

    def _running(self) -> RunningCluster:
        children = [child for wave in self._waves for child in wave]
        return RunningCluster(
            layout=self._layout,
            supervisor_pid=os.getpid(),
            processes=tuple(
                Process(name=child.spec.name, pid=child.process.pid) for child in children
            ),
        )

    def _stay(self) -> None:
        """Start again what ends, until the signal."""
        while True:
            self._stop_signal.check(give_up_with_stdin=False, wait_s=_WATCH_S)
            for wave in self._waves:
                living = [_living(child) for child in wave]
                if living != wave:
                    wave[:] = living
                    write_running(self._layout.files.cluster, self._running())

    def _clean_up(self) -> None:
        files = self._layout.files
        files.cluster.unlink(missing_ok=True)
        # Agents first: they take their models out of Triton.
        for wave in reversed(self._waves):
            stop(wave, _STOP_GRACE_S)
        removed = sweep(SHM, files.shm_prefix)
        logger.info("stopped name=%s swept=%d", self._layout.name, len(removed))


class StopSignal:
    """SIGTERM or SIGINT to this process, or, where asked for, the end of its stdin."""

    def __init__(self, stdin: int) -> None:
        self._stdin = stdin
        self._wakeup, write_end = os.pipe()
        os.set_blocking(write_end, False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _do_nothing)  # the wake-up pipe tells
        signal.set_wakeup_fd(write_end)

    def check(self, *, give_up_with_stdin: bool, wait_s: float = 0.0) -> None:
        """Raise `_Stopped` if told to stop, after at most `wait_s`."""
        sources = [self._wakeup, *([self._stdin] if give_up_with_stdin else [])]
        readable, _, _ = select.select(sources, [], [], wait_s)
        if readable:
            raise _Stopped


class Reporter:
    """Tells `up` how far the start is, for as long as it listens."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def send(self, **fields: str | int) -> None:
        try:
            self._stream.write(json.dumps(fields).encode() + b"\n")
            self._stream.flush()
        except BrokenPipeError:
            logger.info("nobody listens")

    def close(self) -> None:
        """Let the listener see that there is no more to come."""
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), self._stream.fileno())


def main() -> int:
    if os.fork():
        os._exit(0)  # nobody has to wait for the supervisor
    start_logging()
    reporter = Reporter(sys.stdout.buffer)
    line = sys.stdin.buffer.readline()
    if not line:
        return 1
    layout = from_json(ClusterLayout, line)
    with locked(layout.files.lock) as is_ours:
        if not is_ours:
            reporter.send(
                event="failed", message=f"Cluster '{layout.name}' is being started already."
            )
            return 1
        reporter.send(event="owner", pid=os.getpid())
        try:
            Supervisor(layout, StopSignal(sys.stdin.fileno()), reporter).run()
        except ParaServeError as error:
            logger.error("%s", error)
            reporter.send(event="failed", message=str(error))
            return 1
    return 0


def _living(child: Child) -> Child:
    """The child, or if it has ended, one in its place."""
    status = child.process.poll()
    if status is None or time.monotonic() - child.started_s < _RESTART_S:
        return child
    name = child.spec.name
    logger.warning("process ended name=%s status=%d; starting it again", name, status)
    return start(child.spec)


def _do_nothing(_number: int, _frame: object) -> None:
    """Keep the signal from ending the process."""


def _require_alive(children: Sequence[Child]) -> None:
    for child in children:
        status = child.process.poll()
        if status is not None:
            raise Unavailable(
                f"Process {child.spec.name} ended with status {status}; the end of its log "
                f"({child.spec.log}):\n{child.log_tail()}"
            )


def _not_ready(waiting: Sequence[Child]) -> str:
    first = waiting[0]
    return (
        f"Process {first.spec.name} was not ready after {_READY_TIMEOUT_S:.0f} s; the end of its "
        f"log ({first.spec.log}):\n{first.log_tail()}"
    )


if __name__ == "__main__":
    sys.exit(main())
