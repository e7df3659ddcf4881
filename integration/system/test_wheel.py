"""The wheel in an empty environment: what a user gets who has no checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
#: Ends a hang; installing from the registry takes half a minute.
_TIMEOUT_S = 900
_RENDER = """
from paraserve_backend.tritonserver.host.model_config import render
config = render("link", name="link", inputs=(), outputs=(), parameters={}, device="cpu")
print(config.decode())
"""
_TESTBED = """
from importlib import resources
print(resources.files("paraserve_scheduler.simulator") / "testbeds" / "hydraserve-ii.yaml")
"""


class Installed:
    """An environment with nothing but the wheel and what it depends on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        venv.create(folder / "venv", with_pip=True)
        _run(folder, sys.executable, *("-m", "pip", "wheel", "--no-deps", "-w", "."), REPOSITORY)
        (wheel,) = folder.glob("paraserve-*.whl")
        self.run("python", "-m", "pip", "install", "--quiet", wheel)

    def run(self, program: str, *arguments: str | Path) -> str:
        return _run(self._folder, self._folder / "venv" / "bin" / program, *arguments)


def _run(folder: Path, *command: str | Path) -> str:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"))


@pytest.mark.timeout(2 * _TIMEOUT_S)
def test_the_command_line_is_there(installed: Installed) -> None:
    assert "install-backend" in installed.run("paraserve", "--help")


def test_the_backend_can_be_installed(installed: Installed, tmp_path: Path) -> None:
    installed.run("paraserve", "install-backend", tmp_path)
    model = (tmp_path / "paraserve" / "model.py").read_text(encoding="utf-8")
    assert model.startswith("from paraserve_backend.")


def test_the_templates_are_in_it(installed: Installed) -> None:
    assert 'backend: "paraserve"' in installed.run("python", "-c", _RENDER)


def test_the_simulator_runs_the_testbed_that_comes_with_it(installed: Installed) -> None:
    testbed = installed.run("python", "-c", _TESTBED).strip()
    words = ("--cluster", testbed, "--rate", "0.05", "--duration", "600", "--json")
    assert json.loads(installed.run("paraserve", "simulate", *words))["all"]["requests"] > 0


def test_its_types_are_seen(installed: Installed) -> None:
    """PEP 561: type checkers read a package only if it says that it is typed."""
    for package in ("paraserve_backend", "paraserve_scheduler"):
        find = f"from importlib import resources; print(resources.files('{package}') / 'py.typed')"
        assert Path(installed.run("python", "-c", find).strip()).is_file()
