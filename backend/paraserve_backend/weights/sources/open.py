"""Opening a source by its URI, and the local-folder source.

An object store is `paraserve_backend.weights.sources.s3`, loaded only when one is opened.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

from paraserve_backend.errors import (
    AccessDenied,
    Cancelled,
    InvalidRequest,
    NotFound,
    ParaServeError,
    SourceUnavailable,
)
from paraserve_backend.weights.sources.base import (
    Connection,
    Source,
    StoredObject,
    check_key,
)
from paraserve_backend.weights.sources.store_errors import changed

if TYPE_CHECKING:
    from paraserve_backend.weights.sources.s3 import S3Clients


class Sources:
    """Opens sources, and keeps for the next one what takes long to make. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: S3Clients | None = None

    def open(
        self, uri: str, *, endpoint_url: str | None = None, region: str | None = None
    ) -> Source:
        """As `open_source`."""
        try:
            parts = urlsplit(uri)
        except ValueError:
            raise _not_a_source(uri) from None
        if parts.scheme != "s3":
            return _open_path(uri, parts)
        # boto3 takes 0.3 s to import, which a folder need not pay.
        from paraserve_backend.weights.sources.s3 import S3Clients, open_s3

        with self._lock:
            self._clients = self._clients or S3Clients()
        return open_s3(uri, endpoint_url=endpoint_url, region=region, clients=self._clients)

    def prepare(self) -> None:
        """Make what every object store needs before the first of them is wanted."""
        with suppress(ParaServeError):  # whoever opens one is told
            self.open("s3://any")


def open_source(uri: str, *, endpoint_url: str | None = None, region: str | None = None) -> Source:
    """Open `s3://bucket/prefix`, `file:///folder` or an absolute folder path.

    `endpoint_url` and `region` default to what the AWS environment and configuration say. Raises
    `InvalidRequest` where the URI is none of these; nothing is contacted yet.
    """
    return Sources().open(uri, endpoint_url=endpoint_url, region=region)


def _open_path(uri: str, parts: SplitResult) -> FolderSource:
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return _open_folder(uri, Path(unquote(parts.path)))
    if uri and not parts.scheme:
        return _open_folder(uri, Path(uri))
    raise _not_a_source(uri)


def _not_a_source(uri: str) -> InvalidRequest:
    return InvalidRequest(
        f"cannot read models from {uri!r}: use s3://bucket/prefix, file:///folder or /folder"
    )


def _open_folder(uri: str, folder: Path) -> FolderSource:
    if "\0" in str(folder):
        raise _not_a_source(uri)
    if not folder.is_absolute():
        raise InvalidRequest(f"model folder {uri!r} must be an absolute path: nodes have no cwd")
    return FolderSource(uri, folder)


class LazySource:
    """A source that is opened when it is first used, by whichever thread that is."""

    def __init__(self, uri: str, open_it: Callable[[], Source]) -> None:
        self.uri = uri
        self._open = open_it
        self._lock = threading.Lock()
        self._opened: Source | None = None

    def list(self) -> tuple[StoredObject, ...]:
        return self._source().list()

    def connect(self) -> Connection:
        return self._source().connect()

    def _source(self) -> Source:
        with self._lock:
            if self._opened is None:
                self._opened = self._open()
            return self._opened


class FolderSource:
    """A folder on this machine: a local disk or a shared file system.

    Versions are modification times, so that copies of a folder on several nodes must keep them.
    """

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri = uri
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
