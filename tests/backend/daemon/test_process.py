"""What a daemon's process does: it ends on signals, cleans up, and says why it failed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from paraserve_backend.daemon.process import run_daemon
from paraserve_backend.errors import InvalidRequest
from tests.support.limits import HANG_S

#: Serves until told to stop; its clean-up takes a moment. Its settings have a name.
_DAEMON = """
import asyncio, logging, sys
from dataclasses import dataclass
from paraserve_backend.daemon.process import run_daemon

@dataclass(frozen=True)
class Settings:
    name: str

async def serve(config):
    try:
        logging.getLogger("daemon").info("serving %s", config.name)
        await asyncio.Event().wait()
    finally:
        print("cleaning", flush=True)
        await asyncio.sleep(0.5)
        print("clean", flush=True)

sys.exit(run_daemon(Settings, serve, sys.argv[1:], program="daemon"))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    name: str = ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_a_second_one_does_not_break_off_its_clean_up(number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _DAEMON, "--name", "n1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stderr.readline().rstrip().endswith("INFO daemon serving n1")
    process.send_signal(number)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(number)
    output, _ = process.communicate(timeout=HANG_S)
    assert (process.returncode, output) == (0, "clean\n")


def test_what_ends_by_itself_ends_well() -> None:
    async def serve(_config: Settings) -> None:
        await asyncio.sleep(0)

    assert run_daemon(Settings, serve, [], program="daemon") == 0


def test_a_signal_that_comes_at_once_is_heard() -> None:
    async def serve(_config: Settings) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    assert run_daemon(Settings, serve, [], program="daemon") == 0


def test_the_one_task_that_failed_is_why_the_daemon_failed() -> None:
    async def fail() -> None:
        raise InvalidRequest("no such node")

    async def serve(_config: Settings) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(asyncio.Event().wait())
            tasks.create_task(fail())

    with pytest.raises(InvalidRequest, match="no such node"):
        run_daemon(Settings, serve, [], program="daemon")


def test_a_bug_keeps_its_traceback() -> None:
    async def fail() -> None:
        raise ValueError("boom")

    async def serve(_config: Settings) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())

    with pytest.raises(ExceptionGroup):
        run_daemon(Settings, serve, [], program="daemon")


def test_a_wrong_setting_is_named() -> None:
    async def serve(_config: Settings) -> None:
        raise AssertionError

    with pytest.raises(SystemExit):
        run_daemon(Settings, serve, ["--nmae", "x"], program="daemon")
