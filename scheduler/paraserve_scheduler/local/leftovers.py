"""Removes what a cluster left in shared memory and finds processes that belong to it."""

from __future__ import annotations

import shutil
from pathlib import Path


def sweep(shm: Path, prefix: str) -> tuple[str, ...]:
    """Remove everything in `shm` whose name starts with `prefix`; return the names."""
    removed = []
    for path in sorted(shm.glob(f"{prefix}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path.name)
    return tuple(removed)


def processes_with(marks: tuple[str, ...], proc: Path = Path("/proc")) -> tuple[int, ...]:
    """Return the processes that have one of `marks` in their arguments."""
    return tuple(
        int(path.name)
        for path in proc.iterdir()
        if path.name.isdecimal() and any(mark in _arguments(path) for mark in marks)
    )


def _arguments(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return ""
