"""What a node knows of its objects' bytes: a digest for each piece, learnt when the store gave it.

A piece is what one request to the store brought: a chunk of `EXTENT_BYTES`, ending at multiples of
that in its object, or what a plan wanted of one. So plans with other layers have pieces in common.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from paraserve_backend.byte_ranges import ByteRange
from paraserve_backend.weights.sources.digest import digest_of


class DamagedPiece(Exception):
    """Bytes are not those that the store gave. Never reaches a user: they are in the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DigestPiece:
    """Bytes `[start, end)` of an object, and their digest."""

    start: int
    end: int
    digest: int

    @property
    def byte_range(self) -> ByteRange:
        return (self.start, self.end)

    def touches(self, byte_range: ByteRange) -> bool:
        return self.start < byte_range[1] and byte_range[0] < self.end

    def lies_in(self, byte_range: ByteRange) -> bool:
        return byte_range[0] <= self.start and self.end <= byte_range[1]


class DigestBook:
    """The pieces of the objects of one tier, by the objects' file names. Thread-safe."""

    def __init__(self) -> None:
        self._pieces: dict[str, dict[ByteRange, DigestPiece]] = {}
        self._lock = threading.Lock()

    def learn(self, name: str, byte_range: ByteRange, content: memoryview) -> None:
        """Believe bytes that the store itself gave, whatever was known of them before."""
        piece = DigestPiece(start=byte_range[0], end=byte_range[1], digest=digest_of(content))
        with self._lock:
            known = self._pieces.setdefault(name, {})
            before = known.get(byte_range)
            if before is not None and before != piece:
                for other in [it for it in known.values() if it.touches(byte_range)]:
                    del known[other.byte_range]
            known[byte_range] = piece

    def check(self, name: str, byte_range: ByteRange, content: memoryview) -> int:
        """Compare bytes that come from elsewhere with all that is known of them.

        Returns their digest, and raises `DamagedPiece` where they differ. What was not known is
        known from now on.
        """
        start = byte_range[0]
        for piece in self.of(name):
            if piece.lies_in(byte_range) and piece.byte_range != byte_range:
                _compare(piece, content[piece.start - start : piece.end - start])
        found = DigestPiece(start=start, end=byte_range[1], digest=digest_of(content))
        with self._lock:
            known = self._pieces.setdefault(name, {}).setdefault(byte_range, found)
        if known != found:
            raise DamagedPiece(f"bytes {byte_range} are not those that the store gave")
        return found.digest

    def attest(self, name: str, byte_range: ByteRange, fd: int) -> int:
        """Return the digest of bytes in an object's file, for somebody who gets them from here.

        Where it was learnt it is not computed: he finds damage that has come since. Where a larger
        piece is known, that is compared first. Raises `DamagedPiece`.
        """
        pieces = [piece for piece in self.of(name) if piece.touches(byte_range)]
        for piece in pieces:
            if piece.byte_range == byte_range:
                return piece.digest
        for piece in pieces:
            _compare(piece, _read(fd, piece.byte_range))
        return self.check(name, byte_range, _read(fd, byte_range))

    def of(self, name: str) -> tuple[DigestPiece, ...]:
        with self._lock:
            return tuple(self._pieces.get(name, {}).values())

    def add(self, name: str, pieces: Iterable[DigestPiece]) -> None:
        """Take in what an earlier process has learnt."""
        with self._lock:
            known = self._pieces.setdefault(name, {})
            for piece in pieces:
                known.setdefault(piece.byte_range, piece)

    def forget(self, name: str) -> None:
        with self._lock:
            self._pieces.pop(name, None)


def _compare(piece: DigestPiece, content: memoryview) -> None:
    if digest_of(content) != piece.digest:
        raise DamagedPiece(f"bytes {piece.byte_range} are not those that the store gave")


def _read(fd: int, byte_range: ByteRange) -> memoryview:
    start, end = byte_range
    content = memoryview(bytearray(end - start))
    landed = 0
    while landed < len(content):
        count = os.preadv(fd, [content[landed:]], start + landed)
        if count == 0:
            raise DamagedPiece(f"bytes {byte_range} are cut off")
        landed += count
    return content
