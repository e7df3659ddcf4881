from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paraserve_backend.tritonserver.host.stubs import ProcessTable, Stub

_REPOSITORY = Path("/models")


@pytest.fixture
def table(tmp_path: Path) -> ProcessTable:
    (tmp_path / "proc").mkdir()
    (tmp_path / "shm").mkdir()
    return ProcessTable(_REPOSITORY, proc=tmp_path / "proc", shm=tmp_path / "shm")


def add_process(tmp_path: Path, pid: int, *arguments: str) -> None:
    folder = tmp_path / "proc" / str(pid)
    folder.mkdir()
    text = "".join(f"{argument}\0" for argument in arguments)
    (folder / "cmdline").write_text(text)


def stub_arguments(path: str, region: str = "region-1") -> list[str]:
    """Return what Triton 2.51 starts a stub with."""
    return [
        "/opt/backends/python/triton_python_backend_stub",
        path,
        region,
        "1048576",
        "1048576",
        "41",
        "/opt/backends/python",
        "336",
        "m_0_0",
        "/opt/backends/paraserve",
    ]


def test_only_stubs_of_this_repository_are_found(table: ProcessTable, tmp_path: Path) -> None:
    (tmp_path / "shm" / "region-1").touch()
    add_process(tmp_path, 7, *stub_arguments("/models/tiny.1.stage0/1/model.py"))
    add_process(tmp_path, 8, *stub_arguments("/models-of-others/tiny.1/1/model.py"))
    add_process(tmp_path, 9, "/usr/bin/vi", "/models/tiny.1/1/model.py")
    add_process(tmp_path, 10)  # a dead process whose parent has not looked
    (tmp_path / "proc" / "11").mkdir()  # it ended while we looked
    (tmp_path / "proc" / "uptime").touch()
    region = tmp_path / "shm" / "region-1"
    assert table.find() == (Stub(pid=7, model="tiny.1.stage0", shm_region=region),)


def test_a_stub_without_shared_memory_is_found_too(table: ProcessTable, tmp_path: Path) -> None:
    add_process(tmp_path, 7, *stub_arguments("/models/tiny.1/1/model.py"))
    assert table.find() == (Stub(pid=7, model="tiny.1", shm_region=None),)


def test_leftovers_are_removed_and_missing_ones_are_no_error(
    table: ProcessTable, tmp_path: Path
) -> None:
    region = tmp_path / "shm" / "region-1"
    region.touch()
    stubs = [
        Stub(pid=7, model="m", shm_region=region),
        Stub(pid=8, model="m", shm_region=tmp_path / "shm" / "gone"),
        Stub(pid=9, model="m", shm_region=None),
    ]
    table.remove_leftovers(stubs)
    assert not region.exists()


def test_kill_spares_a_process_that_only_has_the_number(
    table: ProcessTable, tmp_path: Path
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        add_process(tmp_path, other.pid, *stub_arguments("/models/new/1/model.py"))
        table.kill(Stub(pid=other.pid, model="old", shm_region=None))
        assert other.poll() is None
        [found] = table.find()
        table.kill(found)
        assert other.wait() == -9
        table.kill(found)


def test_memory_that_is_a_processes_own_is_what_it_shares_with_nobody(
    table: ProcessTable, tmp_path: Path
) -> None:
    stub = Stub(pid=7, model="slot-0.front", shm_region=None)
    assert table.private_bytes(stub) == 0  # it is gone
    add_process(tmp_path, 7, *stub_arguments("/models/slot-0.front/1/model.py"))
    (tmp_path / "proc" / "7" / "statm").write_text("9000 500 120 1 0 300 0")
    assert table.private_bytes(stub) == (500 - 120) * os.sysconf("SC_PAGE_SIZE")


def add_state(tmp_path: Path, pid: int, state: str, parent: int) -> None:
    folder = tmp_path / "proc" / str(pid)
    folder.mkdir(exist_ok=True)
    # A name may hold anything, also what looks like the end of it.
    (folder / "stat").write_text(f"{pid} (a b) S 1 (c)) {state} {parent} 7 7 0 -1 4194560 100")


@pytest.mark.parametrize(
    ("state", "is_stopped"),
    [*((state, True) for state in "TZX"), *((state, False) for state in "RSDtIP")],
)
def test_the_kernel_says_who_is_stopped(
    table: ProcessTable, tmp_path: Path, state: str, is_stopped: bool
) -> None:
    add_process(tmp_path, 7, *stub_arguments("/models/tiny.1/1/model.py"))
    add_process(tmp_path, 8, *stub_arguments("/models/tiny.2/1/model.py"))
    add_state(tmp_path, 7, state, parent=5)
    add_state(tmp_path, 8, "S", parent=6)
    found = table.find()
    assert [stub.pid for stub in table.stopped(found)] == [7] * is_stopped
    add_state(tmp_path, 5, "S", parent=1)
    add_state(tmp_path, 6, state, parent=1)
    assert table.server_stopped(found) is is_stopped


def test_who_is_gone_is_not_stopped(table: ProcessTable) -> None:
    gone = Stub(pid=7, model="tiny.1", shm_region=None)
    assert table.stopped([gone]) == frozenset()
    assert not table.server_stopped([gone])
    assert not table.server_stopped([])
