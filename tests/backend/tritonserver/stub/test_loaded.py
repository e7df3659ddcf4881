from __future__ import annotations

import json
from pathlib import Path

import pytest

from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.tritonserver.stub.loaded import say_loaded

_CHANNEL = {"listen": "tcp://a:1", "next": "tcp://b:2", "key_file": "/key"}
_ROLES: dict[str, dict[str, str]] = {
    "generate": {"fetch_id": "tiny.1.0"},
    "stage": {"replica": "tiny.1", "layers": "0:2/4", "fetch_id": "tiny.1.0"},
    "link": {"replica": "tiny.1", "forward_timeout_s": "30", **_CHANNEL},
    "slot": {"kind": "stage", "device": "cpu"},
}


def model_config(role: str, **parameters: str) -> str:
    values = {"role": role, **_ROLES[role], **parameters}
    return json.dumps(
        {"parameters": {key: {"string_value": value} for key, value in values.items()}}
    )


@pytest.mark.parametrize("role", list(_ROLES))
def test_a_model_of_any_role_says_so_below_its_agents_run_dir(tmp_path: Path, role: str) -> None:
    say_loaded(model_config(role, run_dir=str(tmp_path)), "tiny.1")
    assert RunDir(tmp_path).loaded_file("tiny.1").exists()


def test_without_an_agent_there_is_nobody_to_tell() -> None:
    say_loaded(model_config("generate", fetch_id="", source="/models/tiny"), "tiny")


def test_a_run_dir_that_takes_no_file_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "loaded").touch()
    say_loaded(model_config("slot", run_dir=str(tmp_path)), "slot-0.stage")
