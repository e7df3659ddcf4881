from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

#: Starts a child that starts another one, says their ids, and ends as it is told.
PARENT = """
import os, subprocess, sys, time
from paraserve_backend.engines.process_guard import ProcessGuard

guard = ProcessGuard()
code = "import os, subprocess, sys; print(os.getpid(), flush=True); "
code += "other = subprocess.Popen([sys.executable, '-c', 'import os, time; print(os.getpid(), "
code += "flush=True); time.sleep(600)']); other.wait()"
child = subprocess.Popen([sys.executable, "-c", code])
if input() == "close":
    guard.close()
    print("closed", flush=True)
    input()
os._exit(70)
"""


class Parent:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.children = [int(self.line()), int(self.line())]

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def wait_for_the_end_of_all(self) -> None:
        """Whoever holds our end of the pipe is alive; it ends when the last of them does."""
        assert self.process.stdout is not None
        assert self.process.stdout.read() == ""
        # A process closes its files shortly before it counts as dead.
        while any(is_alive(child) for child in self.children):
            time.sleep(0.01)

    def close(self) -> None:
        for pid in (self.process.pid, *self.children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def parent() -> Iterator[Parent]:
    parent = Parent()
    yield parent
    parent.close()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


@pytest.mark.parametrize("how", ["killed", "left"])
def test_the_children_of_a_process_that_is_gone_go_too(parent: Parent, how: str) -> None:
    if how == "killed":
        os.kill(parent.process.pid, signal.SIGKILL)
    else:
        parent.tell("leave")
    parent.wait_for_the_end_of_all()


def test_a_closed_guard_kills_nobody(parent: Parent) -> None:
    parent.tell("close")
    assert parent.line() == "closed"
    parent.tell("leave")
    parent.process.wait()
    assert all(is_alive(child) for child in parent.children)
