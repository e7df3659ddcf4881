"""Reads bytes from other nodes' tiers: the client of `agent.peer_server`.

A peer is inside the cluster, so it is never asked through a proxy. Requests are plain HTTP/1.1,
signed with the cluster token, which itself is never sent: the URL carries a keyed hash of its path
and of the time until which it is valid.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import ssl
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol
from urllib.parse import parse_qs, urlsplit

from paraserve_backend.errors import SourceUnavailable
from paraserve_backend.weights.sources.base import Connection, Holding
from paraserve_backend.weights.sources.http import HttpConnection, UrlSigner

OBJECTS_PATH = "/objects/"
HOLDINGS_PATH = "/holdings/"
#: A peer that sends nothing for so long is given up; the store has the bytes too.
_TIMEOUT_S = 2.0
_SIGNED_FOR_S = 3600
#: Names in one question; each is 40 characters of a URL.
_MOST_NAMES = 200


class Peer(Protocol):
    """Another node that may have bytes of a fetch in its tier."""

    def holdings(self, names: Collection[str]) -> Mapping[str, Holding]:
        """Return what it has of the objects with these file names.

        Raises `SourceUnavailable` where it does not answer as it should.
        """

    def connect(self, names: Mapping[str, str]) -> Connection:
        """Return a way to the bytes of objects, given their file names by key.

        Nothing is contacted yet. Unlike a store's, none of its errors is final: the bytes are
        elsewhere, too.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpPeer:
    """A peer at `address` (host:port)."""

    address: str
    token: str | None

    def holdings(self, names: Collection[str]) -> Mapping[str, Holding]:
        wanted = sorted(names)
        found: dict[str, Holding] = {}
        client = http.client.HTTPConnection(self.address, timeout=_TIMEOUT_S)
        try:
            for at in range(0, len(wanted), _MOST_NAMES):
                path = HOLDINGS_PATH + ",".join(wanted[at : at + _MOST_NAMES])
                found |= _ask(client, sign(path, self.token, time.time()))
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
            raise SourceUnavailable(f"peer {self.address} gave no answer: {error!r}") from None
        finally:
            client.close()
        return found

    def connect(self, names: Mapping[str, str]) -> HttpConnection:
        def url_for(key: str) -> str:
            target = sign(OBJECTS_PATH + names[key], self.token, time.time())
            return f"http://{self.address}{target}"

        signer = UrlSigner(url_for=url_for, renew=url_for)
        return HttpConnection(signer, tls=_no_tls(), timeout_s=_TIMEOUT_S, proxy=None)


@cache
def _no_tls() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def sign(path: str, token: str | None, now_s: float) -> str:
    """Return `path` with what lets a peer see that a member of the cluster asks."""
    if token is None:
        return path
    expires_s = int(now_s) + _SIGNED_FOR_S
    return f"{path}?expires={expires_s}&signature={_signature(path, expires_s, token)}"


def is_signed(target: str, token: str | None, now_s: float) -> bool:
    """Whether `sign` has made this request target, not too long ago, with the same token."""
    if token is None:
        return True
    parts = urlsplit(target)
    query = parse_qs(parts.query)
    expires, given = query.get("expires", [""])[0], query.get("signature", [""])[0]
    if not expires.isdecimal() or int(expires) < now_s:
        return False
    expected = _signature(parts.path, int(expires), token)
    return hmac.compare_digest(expected.encode(), given.encode())


def _signature(path: str, expires_s: int, token: str) -> str:
    message = f"paraserve peer\n{expires_s}\n{path}".encode()
    return hmac.new(token.encode(), message, hashlib.sha256).hexdigest()


def _ask(client: http.client.HTTPConnection, target: str) -> dict[str, Holding]:
    client.request("GET", target)
    response = client.getresponse()
    body = response.read()
    if response.status != 200:
        raise http.client.HTTPException(f"HTTP {response.status}")
    return {name: _holding(fields) for name, fields in json.loads(body).items()}


def _holding(fields: Mapping[str, list[list[int]]]) -> Holding:
    landed, coming = (
        tuple((int(start), int(end)) for start, end in fields[key]) for key in ("landed", "coming")
    )
    return Holding(landed=landed, coming=coming)
