"""Installs backend `paraserve` in a Triton installation or container; checks Python and NumPy."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.tritonserver.host.install import (
    STUB_NAME,
    required_options,
    stub_python_version,
    write_backend,
)

_PROBE = (
    "import sys, numpy, paraserve_backend.protocol.names; "
    "print('%d.%d' % sys.version_info[:2], numpy.__version__.split('.')[0])"
)
_PROBE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    model: Path
    python: Path
    #: Version of `python`, e.g. "3.11".
    python_version: str
    #: Whether a stub was there to compare with; if not, the versions must still match.
    is_stub_checked: bool


def install_backend(directory: Path, python: Path) -> Installed:
    """Write `directory`/paraserve/model.py.

    Args:
        directory: Triton's backend directory, usually /opt/tritonserver/backends.
        python: the interpreter whose packages Triton's stub shall use.

    Raises:
        InvalidRequest: that interpreter cannot import this package, or Triton's stub is built for
            another Python; nothing is written.
    """
    version = _probe(python)
    stub = directory / "python" / STUB_NAME
    if stub.exists():
        _require_version(stub, python, version)
    return Installed(
        model=write_backend(directory),
        python=python,
        python_version=version,
        is_stub_checked=stub.exists(),
    )


def start_hint(installed: Installed) -> str:
    """Say how tritonserver must be started to find what was installed."""
    options = " \\\n    ".join(required_options(installed.model.parent.parent))
    hint = (
        f"Wrote {installed.model}.\nStart tritonserver like this (and with your repository):\n\n"
        f"  PATH={installed.python.parent}:$PATH tritonserver --model-repository=DIR \\\n"
        f"    {options}\n\nThen start paraserve agent beside it, with the same model repository."
    )
    if installed.is_stub_checked:
        return hint
    return (
        f"{hint}\nNo Python backend was found beside it to check: "
        f"Triton's stub must be built for Python {installed.python_version}."
    )


def _probe(python: Path) -> str:
    """Return the version of `python` after it has imported what the stub will import."""
    try:
        # Isolated, as the stub is: PYTHONPATH does not count.
        done = subprocess.run(
            [str(python), "-I", "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except OSError as error:
        raise InvalidRequest(f"Cannot run {python}: {error.strerror}.") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it failed"])[-1]
        raise InvalidRequest(
            f"{python} cannot import paraserve_backend ({reason}): "
            f"run {python} -m pip install 'paraserve[worker]'."
        )
    version, numpy_major = done.stdout.split()
    if numpy_major != "1":
        raise InvalidRequest(
            f"{python} has numpy {numpy_major}, which Triton's Python stub silently corrupts: "
            f"run {python} -m pip install 'numpy<2'."
        )
    return version


def _require_version(stub: Path, python: Path, version: str) -> None:
    built_for = stub_python_version(stub)
    if built_for != version:
        raise InvalidRequest(
            f"{stub} is built for Python {built_for or 'of an unknown version'}, but {python} is "
            f"{version}: name an interpreter of the stub's version with --python."
        )
