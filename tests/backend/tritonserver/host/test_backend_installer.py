from __future__ import annotations

import sys
from pathlib import Path

import pytest

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.tritonserver.host.backend_installer import install_backend, start_hint
from paraserve_backend.tritonserver.host.install import STUB_NAME, python_version
from paraserve_scheduler.cli.main import main


def backends_with_stub_for(version: str, folder: Path) -> Path:
    stub = folder / "python" / STUB_NAME
    stub.parent.mkdir(parents=True)
    stub.write_bytes(b"\x7fELF..." + f"libpython{version}.so.1.0\0".encode())
    return folder


def fake_python(folder: Path, script: str) -> Path:
    python = folder / "python3"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return python


def test_the_backend_is_one_import_of_the_installed_package(tmp_path: Path) -> None:
    backends = backends_with_stub_for(python_version(), tmp_path)
    installed = install_backend(backends, Path(sys.executable))
    assert installed.is_stub_checked
    lines = (backends / "paraserve" / "model.py").read_text().splitlines()
    assert lines == ["from paraserve_backend.tritonserver.stub.model import TritonPythonModel"]


def test_a_stub_for_another_python_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    backends = backends_with_stub_for("3.8", tmp_path)
    with pytest.raises(InvalidRequest, match=r"built for Python 3\.8.*--python"):
        install_backend(backends, Path(sys.executable))
    assert not (backends / "paraserve").exists()


def test_an_interpreter_without_the_package_is_refused(tmp_path: Path) -> None:
    python = fake_python(tmp_path, "echo \"ModuleNotFoundError: No module named 'x'\" >&2; exit 1")
    with pytest.raises(InvalidRequest, match=r"No module named 'x'.*pip install 'paraserve"):
        install_backend(tmp_path, python)


def test_an_interpreter_with_numpy_2_is_refused(tmp_path: Path) -> None:
    python = fake_python(tmp_path, f"echo {python_version()} 2")
    with pytest.raises(InvalidRequest, match="numpy<2"):
        install_backend(tmp_path, python)


def test_without_a_stub_to_compare_the_hint_says_which_python_it_needs(tmp_path: Path) -> None:
    hint = start_hint(install_backend(tmp_path, Path(sys.executable)))
    assert f"PATH={Path(sys.executable).parent}:$PATH tritonserver" in hint
    assert f"--backend-directory={tmp_path}" in hint
    assert "--model-control-mode=explicit" in hint
    assert f"built for Python {python_version()}" in hint


def test_the_command_reports_a_refusal_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "no-such-python"
    assert main(["install-backend", str(tmp_path), "--python", str(missing)]) == 1
    assert capsys.readouterr().err == (
        f"paraserve: Cannot run {missing}: No such file or directory.\n"
    )
