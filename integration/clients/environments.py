"""Environments of their own for clients that bring many packages, not all of our versions.

    python -m integration.clients.environments

makes the missing ones below .venv-clients, runs the tests of all clients and prints one line of
JSON. The exit status is 1 unless every client passed.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path

_REPOSITORY = Path(__file__).parents[2]
_FOLDER = _REPOSITORY / ".venv-clients"
#: One file for each, called as the package that is the client.
_REQUIREMENTS = Path(__file__).with_name("requirements")
NAMES = ("aiperf", "kserve")


def program(environment: str, name: str) -> Path:
    return _FOLDER / environment / "bin" / name


def is_there(environment: str) -> bool:
    """Whether the environment was made completely, of what the repository names today."""
    made_of = _made_of(environment)
    return made_of.exists() and made_of.read_bytes() == _requirements(environment).read_bytes()


def main() -> int:
    for name in NAMES:
        if not is_there(name):
            make(name)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = [sys.executable, "-m", "pytest", "-v", "integration/system/test_clients.py"]
        subprocess.run([*tests, f"--junitxml={report}"], cwd=_REPOSITORY, check=False)
        result = summary(report.read_text(encoding="utf-8"), _versions())
    sys.stdout.write(json.dumps(result) + "\n")
    return 0 if result["met"] else 1


def make(name: str) -> None:
    venv.create(_FOLDER / name, with_pip=True, clear=True)
    python, requirements = str(program(name, "python")), _requirements(name)
    install = [python, "-m", "pip", "install", "--quiet", "-r", str(requirements)]
    subprocess.run(install, check=True)
    shutil.copy(requirements, _made_of(name))


def summary(junit_xml: str, versions: Mapping[str, str]) -> dict[str, object]:
    """Return the last line: a skipped client was not shown to work."""
    suites = list(ElementTree.fromstring(junit_xml).iter("testsuite"))
    tests, failures, errors, skipped = (
        sum(int(suite.attrib[key]) for suite in suites)
        for key in ("tests", "failures", "errors", "skipped")
    )
    return {
        "clients": dict(versions),
        "passed": tests - failures - errors - skipped,
        "failed": failures + errors,
        "skipped": skipped,
        "met": tests > 0 and not failures + errors + skipped,
    }


def _versions() -> dict[str, str]:
    curl = shutil.which("curl")
    shown = subprocess.check_output([curl, "--version"], text=True).split()[1] if curl else "none"
    versions = {"curl": shown, "tritonclient": importlib.metadata.version("tritonclient")}
    return versions | {name: _pinned(name) for name in NAMES}


def _pinned(name: str) -> str:
    lines = _requirements(name).read_text(encoding="utf-8").splitlines()
    (version,) = (line.removeprefix(f"{name}==") for line in lines if line.startswith(f"{name}=="))
    return version


def _requirements(name: str) -> Path:
    return _REQUIREMENTS / f"{name}.txt"


def _made_of(name: str) -> Path:
    return _FOLDER / name / "requirements.txt"


if __name__ == "__main__":
    sys.exit(main())
