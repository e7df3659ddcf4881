"""Folders and files that only this user can use, wherever they lie and whatever the umask is.

`/dev/shm` is for everybody: who makes a folder of ours there first, or puts a link into it, must
not get our bytes, nor have us write his. So every level is looked at before anything is used.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path

from paraserve_backend.errors import InvalidRequest

_FOLDER_MODE = 0o700
_FILE_MODE = 0o600
#: What a file system puts into its own topmost folder.
_MOUNT_FILES = frozenset({"lost+found"})


def own_folder(path: Path, *, entries: Collection[str]) -> None:
    """Make a folder of ours, with the folders above it, or check the one that is there.

    What is there already has to be ours down to the last file, without any link; modes that are
    too wide are narrowed. `entries` are the names that a folder of its kind may have: one with
    others was not made for it, so its mode is not for us to change. Raises `InvalidRequest` with
    the reason, and what to do.
    """
    for parent in reversed(path.parents):
        _check_parent(parent)
    make_folder(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        before = os.fstat(fd)
        _narrow_root(fd, path, entries)
        _narrow_contents(path, before)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Make a folder in one that is ours, or check that what is there is one of ours."""
    try:
        path.mkdir(mode=_FOLDER_MODE)
    except FileExistsError:
        found = path.lstat()
        _require_ours(path, found)
        if not stat.S_ISDIR(found.st_mode):
            raise InvalidRequest(f"{path} is no folder: remove it, or name another.") from None
    else:
        path.chmod(_FOLDER_MODE)


def create_file(path: Path, *, at_most_one: bool = True) -> int:
    """Return a descriptor for a file of ours, to be written; a new one where `at_most_one`.

    Raises `FileExistsError` where there is anything by that name, even a link, and `at_most_one`.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags | (os.O_EXCL if at_most_one else 0), _FILE_MODE)
    try:
        found = os.fstat(fd)
        _require_ours(path, found)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidRequest(f"{path} is no plain file: remove it.")
        os.fchmod(fd, _FILE_MODE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def write_private(path: Path, text: str) -> None:
    """Make `path` a file of ours, in a folder of ours that is made where it is missing.

    A file that is there is replaced, not written to: somebody may have it open.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    for folder in reversed(missing):
        make_folder(folder)
    make_folder(path.parent)
    path.parent.chmod(_FOLDER_MODE)
    path.unlink(missing_ok=True)
    with open(create_file(path), "w", encoding="ascii") as file:
        file.write(text)


def _check_parent(path: Path) -> None:
    """Check, or make, a folder on the way: nobody else may be able to put another in its place."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        make_folder(path)
        return
    if found.st_uid not in _trusted_users():
        raise _foreign(path, found)
    if stat.S_ISLNK(found.st_mode):
        target = path.resolve()
        for parent in (*reversed(target.parents), target):
            _check_parent(parent)
        return
    if not stat.S_ISDIR(found.st_mode):
        raise InvalidRequest(f"{path} is no folder: name another.")
    if _others_may_write(found) and not found.st_mode & stat.S_ISVTX:
        raise InvalidRequest(
            f"Other users may write to {path}, so they could replace what is in it: take that "
            f"right away (chmod go-w {path}), or name a folder elsewhere."
        )


def _trusted_users() -> frozenset[int]:
    """Us and whoever owns all of the file system, who in a user namespace is not user 0."""
    return frozenset({os.geteuid(), 0, Path("/").stat().st_uid})


def _others_may_write(found: os.stat_result) -> bool:
    if found.st_mode & stat.S_IWOTH:
        return True
    # A group of one's own is the default of many systems, with folders that it may write to.
    return bool(found.st_mode & stat.S_IWGRP) and found.st_gid not in (os.getegid(), 0)


def _narrow_root(fd: int, path: Path, entries: Collection[str]) -> None:
    found = os.fstat(fd)
    _require_ours(path, found)
    if stat.S_IMODE(found.st_mode) == _FOLDER_MODE:
        return
    strange = sorted(set(os.listdir(fd)) - set(entries) - _MOUNT_FILES)
    if found.st_mode & stat.S_ISVTX or strange:
        raise InvalidRequest(
            f"{path} is for other things, too ({', '.join(strange[:3]) or 'all users share it'}), "
            "so it cannot be closed to other users: name a folder of its own below it."
        )
    os.fchmod(fd, _FOLDER_MODE)


def _narrow_contents(path: Path, before: os.stat_result) -> None:
    """Check and narrow what an earlier process left below a folder of ours, as that was `before`.

    Where others could write, a second name of a file may be another file of ours, elsewhere.
    """
    is_suspect = bool(before.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    with os.scandir(path) as scanned:
        entries = list(scanned)
    for entry in entries:
        if entry.name in _MOUNT_FILES:
            continue
        found = entry.stat(follow_symlinks=False)
        _require_ours(Path(entry.path), found)
        is_folder = stat.S_ISDIR(found.st_mode)
        is_plain = stat.S_ISREG(found.st_mode) and not (is_suspect and found.st_nlink > 1)
        if not is_folder and not is_plain:
            raise InvalidRequest(
                f"{entry.path} is a link or no plain file, which is not ours: remove it."
            )
        mode = _FOLDER_MODE if is_folder else _FILE_MODE
        if stat.S_IMODE(found.st_mode) != mode:
            os.chmod(entry.path, mode)
        if is_folder:
            _narrow_contents(Path(entry.path), found)


def _require_ours(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise _foreign(path, found)


def _foreign(path: Path, found: os.stat_result) -> InvalidRequest:
    return InvalidRequest(
        f"{path} belongs to user {found.st_uid}, not to us (user {os.geteuid()}): somebody else "
        "made it first; remove it, or name another folder."
    )
