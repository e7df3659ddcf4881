"""Who owns a cluster: an advisory lock on a file that holds the owner's process id.

The kernel releases the lock when its owner dies, however it dies.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

#: `owner` holds the lock for an instant when it looks.
_PATIENCE_S = 0.2


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Try to hold the lock for the body; yields whether it was free."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("a+") as file:
        if not _taken(file):
            yield False
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield True


def _taken(file: TextIO) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_PATIENCE_S / 20)
        else:
            return True


def owner(path: Path) -> int | None:
    """Return the process that holds the lock, or None."""
    if not path.exists():
        return None
    with path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read()
            return int(text) if text else None
    return None
