"""Writes files that only this user can read, in folders that only this user can enter."""

from __future__ import annotations

import os
from pathlib import Path

from paraserve_backend.errors import InvalidRequest


def write_private(path: Path, text: str) -> None:
    """Make `path` a file of its own with mode 0600, in a folder with mode 0700.

    A file that is there is replaced, not written to: somebody may have it open. The folder is made
    where it is missing.

    Raises:
        InvalidRequest: the folder is somebody else's, or a link.
    """
    folder = _private_folder(path.parent)
    try:
        _remove(path.name, folder)
        # O_EXCL on a fresh name: nobody can have put a readable file, or a link, there before us.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path.name, flags, 0o600, dir_fd=folder)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
    finally:
        os.close(folder)


def _private_folder(path: Path) -> int:
    """Return a descriptor of a folder that is made, or made private, here; the caller closes it.

    Raises:
        InvalidRequest: it is somebody else's, or a link.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidRequest(f"{path} is no folder of ours: {error.strerror}.") from None
    if os.fstat(folder).st_uid != os.geteuid():
        os.close(folder)
        raise InvalidRequest(f"{path} belongs to another user: remove it.")
    os.fchmod(folder, 0o700)
    return folder


def _remove(name: str, folder: int) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return
