"""What a source is: stored objects and their versions, byte ranges, connections. Pure.

`sources.open` opens the implementations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from paraserve_backend.byte_ranges import ByteRange


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreIdentity:
    """Whose bytes a source gives, and to whom: the same URI elsewhere, or read by somebody else,
    names other bytes. Neither part is a secret.
    """

    #: Where requests really go, whatever was asked for: scheme, host, port and path.
    endpoint: str
    #: Who reads there: a hash of what names the credentials, never of a secret.
    principal: str

    def key_of(self, source_uri: str, object_key: str) -> str:
        """Return what nodes and the scheduler call an object of this store, whoever reads it."""
        return f"{self.endpoint} {source_uri}/{object_key}"


#: All folders of a machine: who may read them is up to the file system.
FOLDERS = StoreIdentity(endpoint="file://", principal="folder")
#: Of records that do not say; nothing in a tier is ever known by it.
UNKNOWN_STORE = StoreIdentity(endpoint="", principal="")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """One object (or file) of a source, in one particular version.

    `version` is the ETag, or modification time and size where the source has no ETag. The same
    key with another version holds other bytes.
    """

    key: str
    size_bytes: int
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectRange:
    """Bytes `[start, end)` of an object."""

    object_key: str
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


class BrokenTransfer(Exception):
    """A read ended early for a reason that may pass; `landed_bytes` of it are in place.

    Never reaches a user: `paraserve_backend.weights.sources.retry` resumes it or turns it into an
    error.
    """

    def __init__(self, reason: str, *, landed_bytes: int = 0) -> None:
        super().__init__(reason)
        self.landed_bytes = landed_bytes


class Connection(Protocol):
    """One thread's way to the bytes of a source; kept open from one read to the next."""

    def read_into(self, stored: StoredObject, start: int, view: memoryview) -> None:
        """Fill `view` with the object's bytes from `start` on.

        Raises `BrokenTransfer` where another try may help; `InvalidCheckpoint` where the object is
        no longer the version `stored` names; otherwise `NotFound`, `AccessDenied` or
        `SourceUnavailable`.
        """

    def abort(self) -> None:
        """Make this read and every later one raise `Cancelled` at once. Any thread may call it."""

    def close(self) -> None: ...


class Source(Protocol):
    """A folder of objects: one model's files."""

    @property
    def uri(self) -> str: ...

    @property
    def store(self) -> StoreIdentity: ...

    def list(self) -> tuple[StoredObject, ...]:
        """Return the objects directly in the folder, by key; keys are relative to it.

        Raises `NotFound` where the folder or bucket does not exist or is empty, `AccessDenied`, or
        `SourceUnavailable` after bounded retries.
        """

    def connect(self) -> Connection: ...


def check_key(key: str) -> None:
    """Refuse a key that would leave its folder; raises `ValueError`."""
    if not key or "/" in key or "\0" in key or key in {".", ".."}:
        raise ValueError(f"{key!r} is not the name of a file in a model folder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """Bytes of one object version that are in place, and those that a running fetch will bring."""

    landed: tuple[ByteRange, ...]
    coming: tuple[ByteRange, ...]
