"""Reads bytes from other nodes' tiers: the client of `agent.peer_server`.

A peer is inside the cluster, so it is never asked through a proxy. Requests are plain HTTP/1.1;
both sides prove that they know the cluster token: see `sources.peer_auth`.
"""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol
from urllib.parse import urlsplit

from paraserve_backend.errors import SourceUnavailable
from paraserve_backend.weights.sources.base import (
    BrokenTransfer,
    Connection,
    Holding,
    StoredObject,
)
from paraserve_backend.weights.sources.digest import digest_of
from paraserve_backend.weights.sources.http import HttpConnection, UrlSigner
from paraserve_backend.weights.sources.peer_auth import (
    DIGEST_HEADER,
    PROOF_HEADER,
    PeerAnswer,
    PeerQuestion,
    body_digest,
)

OBJECTS_PATH = "/objects/"
HOLDINGS_PATH = "/holdings/"
#: A peer that sends nothing for so long is given up; the store has the bytes too.
_TIMEOUT_S = 2.0
#: Names in one question; each is 40 characters of a URL.
_MOST_NAMES = 200
#: More than a true answer to so many names ever has.
_MOST_ANSWER_BYTES = 16 << 20


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
                found |= self._ask(client, PeerQuestion.of(self.address, path))
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
            raise SourceUnavailable(f"peer {self.address} gave no answer: {error!r}") from None
        finally:
            client.close()
        return found

    def connect(self, names: Mapping[str, str]) -> Connection:
        return PeerConnection(self.address, self.token, names)

    def _ask(self, client: http.client.HTTPConnection, asked: PeerQuestion) -> dict[str, Holding]:
        client.request("GET", asked.path, headers=asked.headers(self.token, time.time()))
        response = client.getresponse()
        body = response.read(_MOST_ANSWER_BYTES)
        if response.status != 200:
            raise http.client.HTTPException(f"HTTP {response.status}")
        answer = PeerAnswer(
            question=asked, version="", size_bytes=len(body), digest=body_digest(body)
        )
        if not answer.is_proved(response.headers.get(PROOF_HEADER, ""), self.token):
            raise http.client.HTTPException("it does not know the cluster token")
        return {name: _holding(fields) for name, fields in json.loads(body).items()}


class PeerConnection:
    """Reads of one thread. What comes is what a member of the cluster sent, undamaged."""

    def __init__(self, address: str, token: str | None, names: Mapping[str, str]) -> None:
        self._address = address
        self._token = token
        self._names = names
        self._asked: PeerQuestion | None = None
        self._told_digest = 0
        signer = UrlSigner(
            url_for=self._url_for,
            renew=self._url_for,
            headers_for=self._headers_for,
            check=self._check,
        )
        self._inner = HttpConnection(signer, tls=_no_tls(), timeout_s=_TIMEOUT_S, proxy=None)

    def read_into(self, stored: StoredObject, start: int, view: memoryview) -> None:
        self._inner.read_into(stored, start, view)
        if digest_of(view) != self._told_digest:
            raise BrokenTransfer(
                f"peer {self._address} sent other bytes of {stored.key} than it should"
            )

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()

    def _url_for(self, key: str) -> str:
        return f"http://{self._address}{OBJECTS_PATH}{self._names[key]}"

    def _headers_for(self, url: str, start: int, end: int) -> Mapping[str, str]:
        path = urlsplit(url).path
        self._asked = PeerQuestion.of(self._address, path, (start, end))
        return self._asked.headers(self._token, time.time())

    def _check(
        self, stored: StoredObject, start: int, end: int, headers: http.client.HTTPMessage
    ) -> None:
        told = headers.get(DIGEST_HEADER, "")
        assert self._asked is not None, "an answer follows a question"
        answer = PeerAnswer(
            question=self._asked,
            version=stored.version,
            size_bytes=stored.size_bytes,
            digest=told,
        )
        if not answer.is_proved(headers.get(PROOF_HEADER, ""), self._token):
            raise SourceUnavailable(f"peer {self._address} does not know the cluster token")
        if not (told.isascii() and told.isdecimal()):
            raise SourceUnavailable(f"peer {self._address} tells no digest of {stored.key}")
        self._told_digest = int(told)


@cache
def _no_tls() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _holding(fields: Mapping[str, list[list[int]]]) -> Holding:
    landed, coming = (
        tuple((int(start), int(end)) for start, end in fields[key]) for key in ("landed", "coming")
    )
    return Holding(landed=landed, coming=coming)
