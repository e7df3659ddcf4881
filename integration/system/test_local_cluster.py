"""`paraserve up` and `down` with all real processes, and Ctrl-C at several moments of them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from integration.support.capped_cluster import NAME as CAPPED
from integration.support.capped_cluster import CappedCluster, capped_cluster
from integration.support.limits import HANG_S
from integration.support.namespaces import HUB, missing_requirement
from integration.support.namespaces import PREFIX as NAMESPACE_PREFIX
from integration.support.tiny_cluster import pids, wait_until
from paraserve_scheduler.local.cluster import down, files_of, find
from paraserve_scheduler.local.layout import SHM, ClusterFiles
from paraserve_scheduler.local.ports import is_free

REPOSITORY = Path(__file__).resolve().parents[2]


class Home:
    """A state directory of its own; knows all processes, ports and files that come from it."""

    def __init__(self, folder: Path) -> None:
        self.environ = dict(os.environ) | {
            "XDG_STATE_HOME": str(folder),
            "PYTHONFAULTHANDLER": "1",  # see `end_of`
        }
        self._mark = f"XDG_STATE_HOME={folder}".encode()

    def files(self, name: str) -> ClusterFiles:
        return files_of(name, self.environ)

    def command(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            env=self.environ,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str]:
        process = self.command(*words)
        said = end_of(process)
        return process.returncode, said

    def processes(self) -> list[str]:
        found = []
        for path in Path("/proc").iterdir():
            if path.name.isdecimal() and self._mark in _read(path / "environ").split(b"\0"):
                found.append(_read(path / "cmdline").replace(b"\0", b" ").decode())
        return [command for command in found if command]  # a zombie has none

    def assert_nothing_is_left(self, name: str) -> None:
        files = self.files(name)
        assert self.processes() == []
        assert list(SHM.glob(f"{files.shm_prefix}*")) == []
        assert not files.cluster.exists()
        for address in listened(files):
            assert is_free(*address), f"{address} is still in use"


def end_of(process: subprocess.Popen[str]) -> str:
    """Wait for a command's end and return what it said; one that hangs is made to say where."""
    try:
        said, _ = process.communicate(timeout=HANG_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        said, _ = process.communicate(timeout=HANG_S)
        pytest.fail(f"{process.args!r} hung:\n{said}")
    return said


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def listened(files: ClusterFiles) -> list[tuple[str, int]]:
    """Return the addresses that settings files of a cluster name."""
    texts = []
    for path in files.config.glob("*.yaml"):
        settings = yaml.safe_load(path.read_text())
        texts += [settings["listen"], *settings.get("gateway", {}).values()]
        texts += [settings[key] for key in ("triton",) if key in settings]
    parts = [str(text).rpartition(":") for text in texts]
    return [(host, int(port)) for host, _, port in parts if host and port.isdecimal()]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path)
    yield made
    for name in ("one", "demo"):
        down(made.files(name), delete=True)


def wait_until_exists(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + HANG_S
    while not path.exists() and process.poll() is None:
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


def test_a_cluster_comes_up_shows_its_nodes_and_goes_without_a_trace(home: Home) -> None:
    status, said = home.run("paraserve_scheduler.cli", "up", "--name", "one", "--nodes", "2")
    assert status == 0, said
    assert "Cluster 'one' is up: 2 nodes." in said
    status, said = home.run("paraserve_scheduler.cli", "status", "--cluster", "one")
    assert [line.split()[:2] for line in said.splitlines()[1:3]] == [
        ["node1", "alive"],
        ["node2", "alive"],
    ]
    # The checks below would find it if it were left.
    assert sum("tritonserver" in command for command in home.processes()) == 2
    assert list(SHM.glob(f"{home.files('one').shm_prefix}*"))
    assert len(listened(home.files("one"))) >= 7
    status, said = home.run("paraserve_scheduler.cli", "up", "--name", "one")
    assert (status, "is up already" in said) == (1, True)
    assert home.run("paraserve_scheduler.cli", "down", "--name", "one")[0] == 0
    home.assert_nothing_is_left("one")


#: Files that appear one after the other while a cluster starts.
MOMENTS = (
    *("logs/supervisor.log", "config/scheduler.yaml", "logs/s3.log", "logs/node2-triton.log"),
    *("logs/scheduler.log", "logs/node1-agent.log", "logs/node2-agent.log"),
)


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_while_a_cluster_starts_leaves_nothing(home: Home, moment: str) -> None:
    process = home.command("paraserve_scheduler.cli", "up", "--name", "one", "--nodes", "2")
    wait_until_exists(home.files("one").state_dir / moment, process)
    process.send_signal(signal.SIGINT)
    said = end_of(process)
    assert process.returncode == 130, said
    home.assert_nothing_is_left("one")


def test_a_process_that_cannot_start_is_named_with_the_end_of_its_log(home: Home) -> None:
    # One port for two services: the second cannot listen.
    words = (
        "up",
        "--name",
        "one",
        "--nodes",
        "1",
        "--s3-port",
        "18470",
        "--scheduler-port",
        "18470",
    )
    status, said = home.run("paraserve_scheduler.cli", *words)
    assert status == 1
    assert "paraserve: Process" in said
    assert "the end of its log" in said
    assert "18470" in said
    home.assert_nothing_is_left("one")


def test_every_process_that_is_killed_is_started_again(home: Home) -> None:
    home.run("paraserve_scheduler.cli", "up", "--name", "one", "--nodes", "1")
    files = home.files("one")
    for name, pid in pids(files).items():
        os.kill(pid, signal.SIGKILL)
        wait_until(partial(is_replaced, files, name, pid))
    wait_until(lambda: "node1  alive" in shown(home))
    assert home.run("paraserve_scheduler.cli", "down", "--name", "one")[0] == 0
    home.assert_nothing_is_left("one")


def is_replaced(files: ClusterFiles, name: str, pid: int) -> bool:
    return pids(files)[name] != pid


def shown(home: Home) -> str:
    return home.run("paraserve_scheduler.cli", "status", "--cluster", "one")[1]


def test_a_killed_supervisor_takes_all_with_it_and_the_next_up_starts_afresh(home: Home) -> None:
    home.run("paraserve_scheduler.cli", "up", "--name", "one", "--nodes", "1")
    running = find(home.files("one"))
    assert running is not None
    watches = [os.pidfd_open(process.pid) for process in running.processes]
    os.kill(running.supervisor_pid, signal.SIGKILL)
    for watch in watches:
        wait_for_end(watch)
    assert home.run("paraserve_scheduler.cli", "status", "--cluster", "one")[0] == 1
    status, said = home.run("paraserve_scheduler.cli", "up", "--name", "one", "--nodes", "1")
    assert status == 0, said
    assert home.run("paraserve_scheduler.cli", "down", "--name", "one")[0] == 0
    home.assert_nothing_is_left("one")


def wait_for_end(watch: int) -> None:
    assert select.select([watch], [], [], HANG_S)[0], "a process outlived its supervisor"
    os.close(watch)


@pytest.mark.parametrize("moment", ["Cluster of", "Deployed", "Request", "Cold start"])
def test_ctrl_c_in_the_demo_leaves_nothing(home: Home, moment: str) -> None:
    process = home.command("integration.demo", "--nodes", "2")
    assert process.stdout is not None
    for line in process.stdout:
        if moment in line:
            break
    process.send_signal(signal.SIGINT)
    said = end_of(process)
    assert process.returncode == 130, said
    home.assert_nothing_is_left("demo")


@pytest.mark.skipif(missing_requirement() is not None, reason=str(missing_requirement()))
def test_capped_nodes_have_a_network_each_that_is_gone_afterwards(home: Home) -> None:
    wanted = CappedCluster(rates_bits_per_s=(1e9, 5e8), node_memory_bytes=10**9, name="one")
    with capped_cluster(wanted, home.environ) as layout:
        assert len(namespaces()) == 3
        shaped = _output("tc", "-n", HUB, "qdisc", "show")
        assert shaped.count("tbf") == 2
        assert "rate 1Gbit" in shaped
        assert "rate 500Mbit" in shaped
        assert len({node.host for node in layout.nodes} | {layout.host}) == 3
    assert namespaces() == []
    home.assert_nothing_is_left("one")


@pytest.mark.skipif(missing_requirement() is not None, reason=str(missing_requirement()))
def test_one_command_brings_capped_nodes_up_and_one_leaves_nothing(home: Home) -> None:
    starting = home.command(
        "integration.support.capped_cluster", "up", "--gbit", "1", "--node-gb", "1"
    )
    said = end_of(starting)
    assert starting.returncode == 0, said
    assert "1 node(s) are up" in said
    assert len(namespaces()) == 2
    assert find(home.files(CAPPED)) is not None
    ending = home.command("integration.support.capped_cluster", "down")
    said = end_of(ending)
    assert ending.returncode == 0, said
    assert namespaces() == []
    home.assert_nothing_is_left(CAPPED)


def namespaces() -> list[str]:
    names = [line.split()[0] for line in _output("ip", "netns", "list").splitlines()]
    return [name for name in names if name.startswith(NAMESPACE_PREFIX)]


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
