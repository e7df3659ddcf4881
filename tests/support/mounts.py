"""Scripts in a mount namespace of their own: file systems as small as a test wants them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_IN_OWN_NAMESPACE = ("unshare", "--map-root-user", "--mount")
needs_mounts = pytest.mark.skipif(
    subprocess.run([*_IN_OWN_NAMESPACE, "true"], check=False).returncode != 0,
    reason="this machine does not allow mount namespaces",
)


def run_with_mounts(script: str, *arguments: Path) -> str:
    """Run a script that may mount what it likes; returns what it prints."""
    run = subprocess.run(
        [*_IN_OWN_NAMESPACE, sys.executable, "-c", script, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout
