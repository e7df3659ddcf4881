"""Opens a source by its URI: `s3://bucket/prefix`, `file:///folder` or a folder's path.

Object stores are in `sources.s3`, which is imported only when one is opened.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

from paraserve_backend.errors import (
    InvalidRequest,
    ParaServeError,
)
from paraserve_backend.weights.sources.base import (
    Connection,
    Source,
    StoredObject,
)

if TYPE_CHECKING:
    from paraserve_backend.weights.sources.s3 import S3Clients
from paraserve_backend.weights.sources.folder import FolderSource


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
