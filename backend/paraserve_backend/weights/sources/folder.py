"""A folder on this machine as a source: a local disk or a shared file system."""

from __future__ import annotations

import os
from pathlib import Path

from paraserve_backend.errors import (
    AccessDenied,
    Cancelled,
    NotFound,
    SourceUnavailable,
)
from paraserve_backend.weights.sources.base import (
    FOLDERS,
    StoredObject,
    check_key,
)
from paraserve_backend.weights.sources.store_errors import changed


class FolderSource:
    """A folder on this machine: a local disk or a shared file system.

    Versions are modification times, so that copies of a folder on several nodes must keep them.
    """

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri = uri
        self.store = FOLDERS
        self._folder = folder

    def list(self) -> tuple[StoredObject, ...]:
        try:
            with os.scandir(self._folder) as entries:
                # is_file() and stat() follow links: a Hugging Face cache is a folder of links.
                files = [_stored(entry.name, entry.stat()) for entry in entries if entry.is_file()]
        except PermissionError:
            raise AccessDenied(f"no permission to read model folder {self.uri}") from None
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(f"model folder {self.uri} does not exist: {error.strerror}") from None
        except OSError as error:
            raise SourceUnavailable(
                f"cannot read model folder {self.uri}: {error.strerror}"
            ) from None
        if not files:
            raise NotFound(f"model folder {self.uri} holds no files")
        return tuple(sorted(files, key=lambda stored: stored.key))

    def connect(self) -> FileConnection:
        return FileConnection(self._folder)


class FileConnection:
    """Reads of one thread; the file read last stays open."""

    #: Bytes per system call: small enough that `abort` is prompt on a slow disk.
    _STEP_BYTES = 4 << 20

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: tuple[str, int] | None = None
        self._aborted = False

    def read_into(self, stored: StoredObject, start: int, view: memoryview) -> None:
        try:
            fd = self._descriptor(stored.key)
            _check_unchanged(stored, os.fstat(fd))
            self._read(fd, stored, start, view)
        except FileNotFoundError:
            raise NotFound(f"{stored.key} is no longer in its model folder") from None
        except PermissionError:
            raise AccessDenied(f"no permission to read {stored.key}") from None
        except OSError as error:
            raise SourceUnavailable(f"could not read {stored.key}: {error.strerror}") from error

    def _read(self, fd: int, stored: StoredObject, start: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            if self._aborted:
                raise Cancelled(f"reading {stored.key} was cancelled")
            count = os.preadv(fd, [view[done : done + self._STEP_BYTES]], start + done)
            if count == 0:
                raise changed(stored.key)  # shorter than it was
            done += count

    def _descriptor(self, key: str) -> int:
        if self._open is not None and self._open[0] == key:
            return self._open[1]
        self.close()
        check_key(key)
        fd = os.open(self._folder / key, os.O_RDONLY | os.O_CLOEXEC)
        self._open = (key, fd)
        return fd

    def abort(self) -> None:
        self._aborted = True

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None


def _stored(name: str, stat: os.stat_result) -> StoredObject:
    return StoredObject(
        key=name, size_bytes=stat.st_size, version=f"{stat.st_mtime_ns}-{stat.st_size}"
    )


def _check_unchanged(stored: StoredObject, stat: os.stat_result) -> None:
    if _stored(stored.key, stat) != stored:
        raise changed(stored.key)
