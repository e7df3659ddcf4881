"""Opens a source by its URI: `s3://bucket/prefix`, `file:///folder` or a folder's path.

Object stores are in `sources.s3`, which is imported only when one is opened.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

from paraserve_backend.errors import (
    InvalidRequest,
    ParaServeError,
)
from paraserve_backend.weights.sources.base import (
    Source,
    StoreIdentity,
)

if TYPE_CHECKING:
    from paraserve_backend.weights.sources.s3 import S3Clients
from paraserve_backend.weights.sources.folder import FolderSource


class Sources:
    """Opens sources, and keeps for the next one what takes long to make. Thread-safe.

    `principal` is the name of who reads object stores here, where the credentials do not tell it.
    With `roots`, only folders in one of them are read.
    """

    def __init__(self, *, principal: str | None = None, roots: Sequence[Path] = ()) -> None:
        self._principal = principal
        self._roots = roots
        self._lock = threading.Lock()
        self._clients: S3Clients | None = None
        #: Who reads at each endpoint, as last opened.
        self._principals: dict[str, str] = {}

    def open(
        self, uri: str, *, endpoint_url: str | None = None, region: str | None = None
    ) -> Source:
        """As `open_source`."""
        try:
            parts = urlsplit(uri)
        except ValueError:
            raise _not_a_source(uri) from None
        if parts.scheme != "s3":
            return _open_path(uri, parts, self._roots)
        # boto3 takes 0.3 s to import, which a folder need not pay.
        from paraserve_backend.weights.sources.s3 import S3Clients, open_s3

        with self._lock:
            self._clients = self._clients or S3Clients()
        source = open_s3(
            uri,
            endpoint_url=endpoint_url,
            region=region,
            clients=self._clients,
            principal=self._principal,
        )
        self._principals[source.store.endpoint] = source.store.principal
        return source

    def may_use(self, store: StoreIdentity) -> bool:
        """Whether bytes of a store are of use to the next fetch, as far as is known.

        Those that were read with credentials that have been replaced since are not.
        """
        return self._principals.get(store.endpoint, store.principal) == store.principal

    def prepare(self) -> None:
        """Make what every object store needs before the first of them is wanted."""
        with suppress(ParaServeError, OSError, ImportError):  # whoever opens one is told
            self.open("s3://any")


def open_source(uri: str, *, endpoint_url: str | None = None, region: str | None = None) -> Source:
    """Open `s3://bucket/prefix`, `file:///folder` or an absolute folder path.

    `endpoint_url` and `region` default to what the AWS environment and configuration say. Raises
    `InvalidRequest` where the URI is none of these; nothing is contacted yet.
    """
    return Sources().open(uri, endpoint_url=endpoint_url, region=region)


def _open_path(uri: str, parts: SplitResult, roots: Sequence[Path]) -> FolderSource:
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return _open_folder(uri, Path(unquote(parts.path)), roots)
    if uri and not parts.scheme:
        return _open_folder(uri, Path(uri), roots)
    raise _not_a_source(uri)


def _not_a_source(uri: str) -> InvalidRequest:
    return InvalidRequest(
        f"cannot read models from {uri!r}: use s3://bucket/prefix, file:///folder or /folder"
    )


def _open_folder(uri: str, folder: Path, roots: Sequence[Path]) -> FolderSource:
    if "\0" in str(folder):
        raise _not_a_source(uri)
    if not folder.is_absolute():
        raise InvalidRequest(f"model folder {uri!r} must be an absolute path: nodes have no cwd")
    return FolderSource(uri, folder, roots=roots)
