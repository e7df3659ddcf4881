"""A folder on this machine as a source: a local disk or a shared file system."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    Files are read as this process's user, for whoever may write to the folder. So no link leads out
    of it, except in a Hugging Face cache, from a snapshot to the files of its own repository. With
    `roots`, the folder itself has to lie in one of them.
    """

    def __init__(self, uri: str, folder: Path, *, roots: Sequence[Path] = ()) -> None:
        self.uri = uri
        self.store = FOLDERS
        self._folder = folder
        self._roots = roots

    def list(self) -> tuple[StoredObject, ...]:
        try:
            with _opened_folder(self._folder, self._roots) as folder:
                names = os.listdir(folder.fd)
                found = [(name, folder.stat(name)) for name in names]
                files = [_stored(name, stat) for name, stat in found if stat is not None]
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
        return FileConnection(self._folder, self._roots)


class FileConnection:
    """Reads of one thread; the file read last stays open."""

    #: Bytes per system call: small enough that `abort` is prompt on a slow disk.
    _STEP_BYTES = 4 << 20

    def __init__(self, folder: Path, roots: Sequence[Path]) -> None:
        self._folder = folder
        self._roots = roots
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
        with _opened_folder(self._folder, self._roots) as folder:
            fd = folder.open(key)
        self._open = (key, fd)
        return fd

    def abort(self) -> None:
        self._aborted = True

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None


class _OpenFolder:
    """A folder that is open, so that nobody can put another in its place while it is used."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self._path = path
        #: The real folders in which its files may lie.
        self._homes = {path, *_blobs(path)}

    def stat(self, name: str) -> os.stat_result | None:
        """Return what is known of a file, `None` for what is none.

        Raises `AccessDenied` where it is a link out of the folder.
        """
        try:
            with self._located(name) as fd:
                return os.fstat(fd)
        except (FileNotFoundError, IsADirectoryError):
            return None

    def open(self, name: str) -> int:
        """Return a descriptor for reading; raises what `stat` does, or `FileNotFoundError`."""
        with self._located(name) as fd:
            return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)

    @contextmanager
    def _located(self, name: str) -> Iterator[int]:
        """Give a plain file without opening it, and only where its real place is in the folder.

        What was found is what will be read: a check by path would leave time to exchange it.
        """
        fd = os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise IsADirectoryError(name)
            real = _real_path(fd)
            if not any(real.is_relative_to(home) for home in self._homes):
                raise AccessDenied(
                    f"{name} in model folder {self._path} is a link that leaves the folder: put "
                    "the file itself there"
                )
            yield fd
        finally:
            os.close(fd)


@contextmanager
def _opened_folder(folder: Path, roots: Sequence[Path]) -> Iterator[_OpenFolder]:
    """Open a model folder; raises `AccessDenied` where it lies outside all of `roots`."""
    if roots and not any(Path(os.path.normpath(folder)).is_relative_to(it) for it in roots):
        raise _outside(folder, roots)  # and nothing of what is there is looked at or told
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        path = _real_path(fd)
        if roots and not any(path.is_relative_to(root.resolve()) for root in roots):
            raise _outside(folder, roots)
        yield _OpenFolder(fd, path)
    finally:
        os.close(fd)


def _outside(folder: Path, roots: Sequence[Path]) -> AccessDenied:
    allowed = ", ".join(map(str, roots))
    return AccessDenied(f"model folder {folder} is in none of the source_roots: {allowed}")


def _real_path(fd: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{fd}"))


def _blobs(path: Path) -> tuple[Path, ...]:
    """Return where a Hugging Face cache keeps the files that a snapshot's links lead to."""
    repository = path.parents[1] if len(path.parents) > 1 else path
    is_snapshot = path.parent.name == "snapshots" and repository.name.startswith("models--")
    return (repository / "blobs",) if is_snapshot else ()


def _stored(name: str, stat: os.stat_result) -> StoredObject:
    return StoredObject(
        key=name, size_bytes=stat.st_size, version=f"{stat.st_mtime_ns}-{stat.st_size}"
    )


def _check_unchanged(stored: StoredObject, stat: os.stat_result) -> None:
    if _stored(stored.key, stat) != stored:
        raise changed(stored.key)
