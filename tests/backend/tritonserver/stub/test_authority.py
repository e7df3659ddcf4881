"""Who may command a process: its agent, and nobody else, by whatever parameter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.tritonserver.stub.authority import Authority

SECRET = "5e" * 32
COMMAND = json.dumps({"unbind": True})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = RunDir(tmp_path).secret_file("slot-1.front")
    path.parent.mkdir(mode=0o700)
    path.write_text(SECRET)
    return tmp_path


def test_the_agent_of_this_process_is_obeyed(run_dir: Path) -> None:
    authority = Authority.of(run_dir, "slot-1.front")
    parameters = {"command": COMMAND, "paraserve_secret": SECRET, "paraserve_replica": "d.1"}
    assert authority.command(parameters, has_tensors=False) == COMMAND


@pytest.mark.parametrize(
    "secret", [None, "", " ", SECRET[:-1], SECRET + " ", SECRET.upper(), "é", 5, True, [SECRET]]
)
@pytest.mark.parametrize("command", [COMMAND, "", "{}", 5, True, "x" * 1000])
def test_without_the_secret_no_command_is_obeyed(
    run_dir: Path, secret: object, command: object
) -> None:
    authority = Authority.of(run_dir, "slot-1.front")
    parameters = {"command": command}
    if secret is not None:
        parameters["paraserve_secret"] = secret
    for has_tensors in (True, False):
        with pytest.raises(InvalidRequest, match="'command' is not for clients"):
            authority.command(parameters, has_tensors=has_tensors)


def test_a_request_with_tensors_carries_no_command(run_dir: Path) -> None:
    parameters = {"command": COMMAND, "paraserve_secret": SECRET}
    with pytest.raises(InvalidRequest, match="'command' is not for clients"):
        Authority.of(run_dir, "slot-1.front").command(parameters, has_tensors=True)


@pytest.mark.parametrize("secret", ["", SECRET])
@pytest.mark.parametrize("place", ["none", "another model", "empty"])
def test_a_process_whose_agent_wrote_no_secret_takes_no_commands(
    run_dir: Path, place: str, secret: str
) -> None:
    RunDir(run_dir).secret_file("empty").write_text("\n")
    found = {
        "none": Authority.of(None, "slot-1.front"),
        "another model": Authority.of(run_dir, "slot-2.front"),
        "empty": Authority.of(run_dir, "empty"),
    }[place]
    with pytest.raises(InvalidRequest, match="'command' is not for clients"):
        found.command({"command": COMMAND, "paraserve_secret": secret}, has_tensors=False)


@pytest.mark.parametrize(
    ("parameters", "has_tensors", "name"),
    [
        ({"paraserve_secret": SECRET}, True, "paraserve_secret"),
        ({"paraserve_secret": SECRET}, False, "paraserve_secret"),
        ({"paraserve_probe": True}, True, "paraserve_probe"),
        ({"paraserve_probe": "true"}, False, "paraserve_probe"),
        ({"paraserve_probe": False}, False, "paraserve_probe"),
        ({"paraserve_new": 1}, True, "paraserve_new"),
        ({"paraserve_": 1, "command": COMMAND, "paraserve_secret": SECRET}, False, "paraserve_"),
    ],
)
def test_what_is_ours_is_refused_by_name(
    run_dir: Path, parameters: dict[str, Any], has_tensors: bool, name: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"'{name}' is not for clients; leave it out"):
        Authority.of(run_dir, "slot-1.front").command(parameters, has_tensors=has_tensors)


def test_a_long_name_is_not_given_back_whole() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Authority(None).command({"paraserve_" + "x" * 10_000: 1}, has_tensors=True)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"max_tokens": 3, "resume": "x", "id": "7", "commands": "x"},
        {"paraserve_replica": "d.1"},
        {"paraserve_probe": True, "paraserve_replica": "d.1"},
    ],
)
def test_other_requests_carry_no_command(parameters: dict[str, Any]) -> None:
    assert Authority(None).command(parameters, has_tensors=False) is None
