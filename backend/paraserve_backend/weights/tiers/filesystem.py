"""What tiers need of Linux file systems: holes in sparse files, free and used bytes, locks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path

from paraserve_backend.byte_ranges import ByteRange
from paraserve_backend.daemon.private_files import create_file
from paraserve_backend.errors import AlreadyExists

#: Name of the file whose lock says that a process uses a tier's folder.
LOCK = "lock"
# From linux/falloc.h; the os module has no call for it.
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2


def free_range(path: Path, byte_range: ByteRange) -> None:
    """Free the pages that lie wholly in `byte_range`; the rest of it reads as zeros."""
    libc = ctypes.CDLL(None, use_errno=True)
    start, end = byte_range
    with path.open("r+b") as file:
        failed = libc.fallocate(
            file.fileno(),
            _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE,
            ctypes.c_int64(start),
            ctypes.c_int64(end - start),
        )
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))


def first_hole(path: Path, byte_range: ByteRange) -> int | None:
    """Return the offset of the first byte of a range that was never written; `None` if all were."""
    start, end = byte_range
    with path.open("rb") as file:
        try:
            data = os.lseek(file.fileno(), start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # no data from `start` to the end of the file
                raise
            return start
        hole = start if data > start else os.lseek(file.fileno(), start, os.SEEK_HOLE)
    return hole if hole < end else None


def free_bytes(directory: Path) -> int:
    """Return how much room the file system of `directory` has left."""
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize


def used_bytes(path: Path) -> int:
    """Return the memory or disk that a file takes, holes not counted."""
    return path.stat().st_blocks * 512


def lock_folder(directory: Path) -> int:
    """Return what holds the lock until it is closed, or the process ends.

    Raises `AlreadyExists` where another process has it.
    """
    fd = create_file(directory / LOCK, at_most_one=False)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise AlreadyExists(
            f"another agent uses the tier {directory}: give each agent its own"
        ) from None
    return fd
