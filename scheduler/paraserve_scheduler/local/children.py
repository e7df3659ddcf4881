"""Child processes with a log file each, which cannot outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LOG_TAIL_LINES = 8
#: The kernel needs a moment to take apart what was killed.
_KILL_WAIT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """A process to start. `is_ready` is asked again and again until it says yes."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    is_ready: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Child:
    spec: ProcessSpec
    process: subprocess.Popen[bytes]
    #: By `time.monotonic`.
    started_s: float

    @property
    def is_ready(self) -> bool:
        return self.spec.is_ready()

    def log_tail(self) -> str:
        return log_tail(self.spec.log)


def log_tail(log: Path, num_lines: int = _LOG_TAIL_LINES) -> str:
    """Return the last lines of a log, indented for an error message."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return "\n".join(f"    {line}" for line in text.splitlines()[-num_lines:])


def start(spec: ProcessSpec) -> Child:
    """Start a process in its own process group; call it from the main thread only.

    Not in its own session: Linux shares processors evenly between sessions, and what nodes of one
    machine do at low priority would then get as much as what others of them serve. The kernel ties
    the child's life to the thread that starts it.
    """
    spec.log.parent.mkdir(parents=True, exist_ok=True)
    with spec.log.open("ab") as log:
        process = subprocess.Popen(
            spec.command,
            env=dict(spec.environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=_die_with(os.getpid()),
        )
    return Child(spec, process, time.monotonic())


def stop(children: Iterable[Child], grace_s: float) -> None:
    """End all of them: SIGTERM, and SIGKILL for those still there after `grace_s`."""
    running = [child.process for child in children if child.process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + grace_s
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    for process in running:
        process.wait(_KILL_WAIT_S)


def _die_with(parent_pid: int) -> Callable[[], None]:
    # Loaded before the fork: between fork and exec nothing may be imported or allocated at length.
    prctl = ctypes.CDLL(None).prctl

    def ask_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it died before the line above
            os.kill(os.getpid(), signal.SIGKILL)

    return ask_kernel
