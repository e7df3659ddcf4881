from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from paraserve_backend.errors import NotFound
from paraserve_scheduler.cli.doctor import machine
from paraserve_scheduler.cli.doctor.machine import Finding, State
from paraserve_scheduler.cli.main import main


@pytest.mark.parametrize(
    ("finding", "state", "remedy"),
    [
        (machine.check_python((3, 10)), State.MISSING, "Python 3.11"),
        (machine.check_python((3, 11)), State.OK, ""),
        (machine.check_numpy(None), State.MISSING, "pip install 'numpy<2'"),
        (machine.check_numpy("2.4.6"), State.MISSING, "pip install 'numpy<2'"),
        (machine.check_numpy("1.26.4"), State.OK, ""),
        (machine.check_package("torch", None), State.MISSING, "pip install 'paraserve[worker]'"),
        (machine.check_shm(64 << 20), State.MISSING, "--shm-size"),
        (machine.check_huge_pages("never"), State.ABSENT, "remount,huge=within_size /dev/shm"),
        (machine.check_huge_pages("within_size"), State.OK, ""),
        (machine.check_memory(1 << 30), State.MISSING, "fewer nodes"),
        (machine.check_ports([8000]), State.ABSENT, "others"),
        (machine.check_root(False), State.ABSENT, "sudo"),
        (machine.check_gpu(("cpu",)), State.ABSENT, "CPU"),
        (machine.check_gpu(("cuda:0",)), State.OK, ""),
        (
            machine.check_tool("tc", None, State.ABSENT, "apt-get install iproute2"),
            State.ABSENT,
            "apt",
        ),
    ],
)
def test_a_check_says_what_is_wrong_and_how_to_get_it(
    finding: Finding, state: State, remedy: str
) -> None:
    assert finding.state is state
    assert remedy in finding.remedy
    assert bool(finding.remedy) == (state is not State.OK)


@pytest.mark.parametrize(
    ("options", "huge"),
    [("rw,size=65536k", "never"), ("rw,huge=within_size,size=65536k", "within_size")],
)
def test_huge_pages_are_an_option_of_the_mount(options: str, huge: str) -> None:
    mounts = f"proc /proc proc rw 0 0\ntmpfs /dev/shm tmpfs {options} 0 0\n"
    assert machine.huge_pages_of(mounts) == huge


def failing(sentence: str) -> Callable[[], str]:
    def find() -> str:
        raise NotFound(sentence)

    return find


def test_a_finder_that_finds_nothing_becomes_detail_and_remedy() -> None:
    finding = machine.check_found(
        "libpython", failing("No libpython here: run apt-get install it.")
    )
    assert (finding.state, finding.detail) == (State.MISSING, "No libpython here")
    assert finding.remedy == "run apt-get install it"


def test_this_machine_can_run_the_tests(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert main(["doctor", "--json"]) == 0
    findings = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert findings["torch"]["state"] == "ok"
    assert {"libpython", "rclone", "/dev/shm", "huge pages", "GPU", "ip", "tc"} <= findings.keys()
