"""Removes what a cluster left in shared memory."""

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
