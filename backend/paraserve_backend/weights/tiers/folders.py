"""A folder that one process at a time writes to."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from paraserve_backend.errors import AlreadyExists


def lock_folder(directory: Path) -> int:
    """Return what holds the lock until it is closed, or the process ends.

    Raises `AlreadyExists` where another process has it.
    """
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise AlreadyExists(
            f"another agent uses the tier {directory}: give each agent its own"
        ) from None
    return fd
