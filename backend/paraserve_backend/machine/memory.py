"""How much memory this host could give out now."""

from __future__ import annotations

from pathlib import Path

from paraserve_backend.errors import InvalidRequest


def available_bytes(proc: Path) -> int:
    """Return the memory the kernel could give out now (MemAvailable)."""
    for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise InvalidRequest("This kernel does not tell its free memory: set memory_bytes.")
