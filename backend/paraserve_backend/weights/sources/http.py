"""Reads byte ranges of stored objects over one keep-alive HTTP connection, straight into a buffer.

It knows HTTP, proxies and the errors of S3-like stores. Who makes the URLs is up to the caller.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from urllib.parse import SplitResult, urlsplit

from paraserve_backend.errors import Cancelled, ParaServeError, SourceUnavailable
from paraserve_backend.weights.sources.base import BrokenTransfer, StoredObject
from paraserve_backend.weights.sources.store_errors import (
    REGION_HEADER,
    changed,
    read_refusal,
    refused,
)

#: Bytes asked of the socket at a time: what a reset in mid-read can lose at most.
_STEP_BYTES = 256 << 10
#: A thread that waits for bytes sleeps until so many are there: each waking costs as much CPU time
#: as the copy of what a slow network has delivered since the last one.
_WAKE_BYTES = 128 << 10
#: What `http.client` may have read beyond an answer's header.
_READ_AHEAD_BYTES = 8 << 10
#: Bytes of an error page that are looked at.
_ERROR_PAGE_BYTES = 16 << 10
_HTTPS_PORT = 443
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def _no_headers(url: str, start: int, end: int) -> Mapping[str, str]:
    return {}


def _believe(stored: StoredObject, start: int, end: int, headers: http.client.HTTPMessage) -> None:
    """A store is known by its certificate, or not at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlSigner:
    """`url_for(key)` gives a URL that allows GET; `renew(key)` one that is freshly signed."""

    url_for: Callable[[str], str]
    renew: Callable[[str], str]
    #: Further headers of a request for bytes `[start, end)`.
    headers_for: Callable[[str, int, int], Mapping[str, str]] = _no_headers
    #: Raises `SourceUnavailable` where an answer's headers are not to be believed.
    check: Callable[[StoredObject, int, int, http.client.HTTPMessage], None] = _believe


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpProxy:
    """A proxy that forwards plain requests and tunnels TLS."""

    host: str
    port: int
    #: What each request or tunnel tells it; may hold a password.
    headers: Mapping[str, str] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def http_version(etag: str, modified_s: int, size_bytes: int) -> str:
    """Return a `StoredObject.version`; some stores have no ETag to give."""
    return etag.strip('"') or f"{modified_s}-{size_bytes}"


class HttpConnection:
    """Reads of one thread. `timeout_s` bounds connecting and every wait for more bytes.

    With a `proxy` nothing is asked of a store directly.
    """

    def __init__(
        self,
        signer: UrlSigner,
        *,
        tls: ssl.SSLContext,
        timeout_s: float,
        proxy: HttpProxy | None,
    ) -> None:
        self._proxy = proxy
        self._signer = signer
        self._tls = tls
        self._timeout_s = timeout_s
        self._client: http.client.HTTPConnection | None = None
        self._host: tuple[str, str] | None = None
        self._socket: socket.socket | None = None
        self._aborted = False
        self._wake_bytes = 1

    def read_into(self, stored: StoredObject, start: int, view: memoryview) -> None:
        landed = 0
        try:
            response = self._get_signed(stored, start, start + len(view))
            _check_response(response, stored, start, start + len(view))
            self._signer.check(stored, start, start + len(view), response.headers)
            while landed < len(view):
                self._wake_late(len(view) - landed)
                count = response.readinto(view[landed : landed + _STEP_BYTES])
                if count == 0:
                    raise BrokenTransfer("the connection closed early", landed_bytes=landed)
                landed += count
            self._finish(response)
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            if self._aborted:
                raise Cancelled(f"reading {stored.key} was cancelled") from None
            raise BrokenTransfer(self._reason(error), landed_bytes=landed) from None
        except (BrokenTransfer, ParaServeError):
            # Whatever the server still has to say would be taken for the next answer.
            self._drop()
            if self._aborted:
                raise Cancelled(f"reading {stored.key} was cancelled") from None
            raise

    def abort(self) -> None:
        self._aborted = True
        if (sock := self._socket) is not None:
            # close() would not wake a thread that waits in recv().
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # no longer connected: nothing waits on it

    def close(self) -> None:
        self._drop()

    def _get_signed(self, stored: StoredObject, start: int, end: int) -> http.client.HTTPResponse:
        response = self._get(self._signer.url_for(stored.key), start, end)
        if response.status in (400, 401, 403):
            # The signature may have run out, or the session credentials behind it.
            self._drop()
            response = self._get(self._signer.renew(stored.key), start, end)
        if response.status not in (200, 206):
            raise _refusal(response, stored)
        return response

    def _get(self, url: str, start: int, end: int) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        client = self._connected(parts)
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        headers = {"Range": f"bytes={start}-{end - 1}"} | dict(
            self._signer.headers_for(url, start, end)
        )
        if self._proxy is not None and parts.scheme == "http":
            target = f"http://{parts.netloc.rpartition('@')[2]}{target}"
            headers |= self._proxy.headers
        client.request("GET", target, headers=headers)
        return client.getresponse()

    def _connected(self, parts: SplitResult) -> http.client.HTTPConnection:
        host = (parts.scheme, parts.netloc)
        if self._client is None or self._host != host:
            self._drop()
            self._client, self._host = self._new_client(parts), host
        if self._client.sock is None:
            if self._aborted:
                raise Cancelled("the connection was aborted")
            self._client.connect()
            # Kept, since the client forgets its socket while a last answer is still being read.
            self._socket = self._client.sock
            self._wake_bytes = 1
        if self._aborted:  # set while connecting, when there was no socket to shut down
            raise Cancelled("the connection was aborted")
        return self._client

    def _new_client(self, parts: SplitResult) -> http.client.HTTPConnection:
        host, port = parts.hostname or "", parts.port
        if self._proxy is not None:
            host, port = self._proxy.host, self._proxy.port
        if parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=self._timeout_s)
        client = http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=self._tls)
        if self._proxy is not None:
            client.set_tunnel(
                parts.hostname or "", parts.port or _HTTPS_PORT, headers=dict(self._proxy.headers)
            )
        return client

    def _wake_late(self, left_bytes: int) -> None:
        """Set how many bytes end a wait; `left_bytes` of the answer are still to come."""
        if isinstance(self._socket, ssl.SSLSocket) or self._socket is None:
            return  # records are decrypted one by one
        # Never for more than the rest of the answer after this step: it would not come.
        is_far = left_bytes >= _STEP_BYTES + _READ_AHEAD_BYTES + _WAKE_BYTES
        wake_bytes = _WAKE_BYTES if is_far else 1
        if wake_bytes != self._wake_bytes:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wake_bytes)
            self._wake_bytes = wake_bytes

    def _finish(self, response: http.client.HTTPResponse) -> None:
        # A chunked body ends with a last chunk, which has to be read before the next request.
        if not response.isclosed() and response.read(1):
            self._drop()

    def _reason(self, error: Exception) -> str:
        via = "" if self._proxy is None else f" (through proxy {self._proxy})"
        if isinstance(error, TimeoutError):
            return f"the store sent nothing for too long{via}"
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return said + via

    def _drop(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = self._host = self._socket = None


def _check_response(
    response: http.client.HTTPResponse, stored: StoredObject, start: int, end: int
) -> None:
    """Make sure that the body is exactly bytes `[start, end)` of this version of the object."""
    size_bytes = _check_range(response, stored, start, end)
    length = response.headers.get("Content-Length")
    if length is not None and length != str(end - start):
        raise SourceUnavailable(
            f"asked for {end - start} bytes of {stored.key}, was promised {length}"
        )
    modified = response.headers.get("Last-Modified")
    modified_s = int(parsedate_to_datetime(modified).timestamp()) if modified else 0
    version = http_version(response.headers.get("ETag", ""), modified_s, size_bytes)
    if size_bytes != stored.size_bytes or version != stored.version:
        raise changed(stored.key)


def _check_range(
    response: http.client.HTTPResponse, stored: StoredObject, start: int, end: int
) -> int:
    """Return the object's size as the store tells it, once the answer's range is the one asked."""
    header = response.headers.get("Content-Range")
    if header is None and response.status == 200:
        return _check_whole(response, stored, start, end)
    # Some stores answer a range with status 200 (rclone does); the header is what counts.
    match = _CONTENT_RANGE.fullmatch(header or "")
    if match is None or (int(match[1]), int(match[2]) + 1) != (start, end):
        if match is not None and int(match[3]) < end:
            return int(match[3])  # shorter than it was: reported as a changed object
        raise SourceUnavailable(
            f"asked for bytes {start}-{end - 1} of {stored.key}, the store sent {header!r}"
        )
    return int(match[3])


def _check_whole(
    response: http.client.HTTPResponse, stored: StoredObject, start: int, end: int
) -> int:
    if start != 0 or end != stored.size_bytes:
        raise SourceUnavailable(
            f"the store ignores byte ranges and sent {stored.key} whole; use one that supports them"
        )
    return int(response.headers.get("Content-Length", end))


def _refusal(
    response: http.client.HTTPResponse, stored: StoredObject
) -> ParaServeError | BrokenTransfer:
    region = response.headers.get(REGION_HEADER)
    refusal = read_refusal(response.status, region, response.read(_ERROR_PAGE_BYTES))
    if response.status in _TRANSIENT:
        return BrokenTransfer(f"the store answered {refusal.said}")
    if response.status == 416:
        return changed(stored.key)  # shorter than it was
    return refused(stored.key, refusal)
