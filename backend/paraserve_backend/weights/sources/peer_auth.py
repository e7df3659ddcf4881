"""How agents prove to each other that they know the cluster token, which itself is never sent.

A question carries a keyed hash of all that it asks, of whom, and until when. So what was overheard
asks no other node, and for no other bytes. It also carries a nonce, and the answer a keyed hash of
that nonce and of what is answered. So nobody without the token can answer. The bytes are bound to
it by their digest, which tells damage, not somebody on the way who changes bytes on purpose.
Without a token agents listen on loopback only, and nothing is signed. Pure but for the nonce.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from paraserve_backend.byte_ranges import ByteRange

NONCE_HEADER = "X-Paraserve-Nonce"
EXPIRES_HEADER = "X-Paraserve-Expires"
SIGNATURE_HEADER = "X-Paraserve-Signature"
DIGEST_HEADER = "X-Paraserve-Digest"
PROOF_HEADER = "X-Paraserve-Proof"
#: What a question's proof is in.
SIGNED_HEADERS = (EXPIRES_HEADER, SIGNATURE_HEADER)
#: Clocks of nodes may differ by so much.
_SIGNED_FOR_S = 300
_MOST_NONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerQuestion:
    """A GET of one peer; `byte_range` is `None` where it is not for bytes of an object."""

    host: str
    path: str
    byte_range: ByteRange | None
    nonce: str

    @classmethod
    def of(cls, host: str, path: str, byte_range: ByteRange | None = None) -> PeerQuestion:
        return cls(host=host, path=path, byte_range=byte_range, nonce=secrets.token_hex(16))

    def headers(self, token: str | None, now_s: float) -> dict[str, str]:
        """Return what a peer sees by that a member of the cluster asks."""
        if token is None:
            return {NONCE_HEADER: self.nonce}
        expires_s = int(now_s) + _SIGNED_FOR_S
        return {
            NONCE_HEADER: self.nonce,
            EXPIRES_HEADER: str(expires_s),
            SIGNATURE_HEADER: self._signature(token, expires_s),
        }

    def is_signed(self, headers: Mapping[str, str], token: str | None, now_s: float) -> bool:
        """Whether `headers` of the same question are of now, and of who knows the token."""
        if token is None:
            return True
        expires = headers.get(EXPIRES_HEADER, "")
        if not (expires.isascii() and expires.isdecimal() and len(expires) < 16):
            return False
        if not now_s <= int(expires) <= now_s + 2 * _SIGNED_FOR_S or len(self.nonce) > _MOST_NONCE:
            return False
        given = headers.get(SIGNATURE_HEADER, "")
        return _agree(given, self._signature(token, int(expires)))

    @property
    def said(self) -> tuple[str, ...]:
        asked = "" if self.byte_range is None else f"{self.byte_range[0]}-{self.byte_range[1]}"
        return ("GET", self.host, self.path, asked, self.nonce)

    def _signature(self, token: str, expires_s: int) -> str:
        return _keyed(token, "question", *self.said, str(expires_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAnswer:
    """What a peer says to a question, before the bytes themselves."""

    question: PeerQuestion
    version: str
    size_bytes: int
    #: Of the bytes that follow.
    digest: str

    def proof(self, token: str | None) -> str:
        if token is None:
            return ""
        said = (*self.question.said, self.version, str(self.size_bytes), self.digest)
        return _keyed(token, "answer", *said)

    def is_proved(self, given: str, token: str | None) -> bool:
        return token is None or _agree(given, self.proof(token))


def body_digest(body: bytes) -> str:
    """Return the digest of an answer that is small."""
    return hashlib.sha256(body).hexdigest()


def _keyed(token: str, *said: str) -> str:
    # Lengths first: no two lists of strings are one message.
    message = "".join(f"{len(each)}:{each}" for each in ("paraserve peer", *said))
    return hmac.new(token.encode(), message.encode(errors="replace"), hashlib.sha256).hexdigest()


def _agree(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), expected.encode())
