"""What outlives the scheduler process, in SQLite: deployments, replicas, numbers used only once.

Every call is one short transaction. Observed state is not stored: nodes report it again. The file
holds keys, so only its owner may read it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import zmq

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.weights.checkpoint.index import CheckpointIndex
from paraserve_backend.weights.checkpoint.model import spec_of
from paraserve_scheduler.state.records import Replica
from paraserve_scheduler.state.spec import ChannelKeys, Deployment, DeploymentSpec
from paraserve_scheduler.store.records import dump, load

_SCHEMA_VERSION = 4
#: The state of a hand-over lay flat in a replica's record until schema 2. By its names there.
_FLAT_HAND_OVER = {
    "targets": "notified",
    "telling": "is_notifying",
    "telling_failed_s": "notify_failed_s",
    "hand_over_s": "since_s",
    "failed_successors": "failed_successors",
    "successor_failed_s": "successor_failed_s",
}
_LONGEST_TOKEN = "longest_token_bytes"
#: A scheduler that is shutting down still holds the file for a moment.
_LOCK_TIMEOUT_S = 1.0
_SCHEMA = """
CREATE TABLE deployments (
    name TEXT PRIMARY KEY, spec TEXT NOT NULL, index_json BLOB NOT NULL,
    deployed_s REAL NOT NULL, deleting INTEGER NOT NULL DEFAULT 0,
    public_key TEXT NOT NULL, secret_key TEXT NOT NULL,
    longest_token_bytes INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE replicas (
    replica TEXT PRIMARY KEY, deployment TEXT NOT NULL, number INTEGER NOT NULL,
    record TEXT NOT NULL
) STRICT;
CREATE TABLE counters (
    deployment TEXT PRIMARY KEY, last_number INTEGER NOT NULL, failure_number INTEGER NOT NULL
) STRICT;
CREATE TABLE cordoned (node TEXT PRIMARY KEY) STRICT;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDeployment:
    deployment: Deployment
    deployed_s: float
    deleting: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Of one deployment name; they outlive a deployment of that name."""

    last_number: int = 0
    failure_number: int = 0


class Store(Protocol):
    def deployments(self) -> tuple[StoredDeployment, ...]: ...

    def replicas(self) -> tuple[Replica, ...]:
        """Every replica that is live or whose timeline is kept, oldest first."""

    def counters(self, deployment: str) -> Counters: ...

    def channel_keys(self, deployment: str) -> ChannelKeys:
        """The keys that its replicas share for as long as it is deployed."""

    def add_deployment(self, deployment: Deployment, deployed_s: float) -> None:
        """Keep it, with fresh keys."""

    def mark_deleting(self, deployment: str) -> None: ...

    def drop_deployment(self, deployment: str) -> None:
        """Forget it and its replicas, but not its counters."""

    def save_replica(self, replica: Replica) -> None: ...

    def drop_replica(self, replica: str) -> None: ...

    def save_counters(self, deployment: str, counters: Counters) -> None: ...

    def cordoned_nodes(self) -> frozenset[str]: ...

    def save_cordoned_nodes(self, nodes: Set[str]) -> None: ...


class SqliteStore:
    """`Store` in one file; `Path(":memory:")` keeps nothing. Belongs to one thread."""

    def __init__(self, path: Path) -> None:
        _make_private(path)
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=_LOCK_TIMEOUT_S)
        try:
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            # A lost power supply may cost the last transactions, never the database.
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._create_tables(path)
        except sqlite3.OperationalError as error:
            self._connection.close()
            raise InvalidRequest(
                f"Cannot use state file {path}: {error}. Does another scheduler run on it?"
            ) from error

    def _create_tables(self, path: Path) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._connection.executescript(
                f"BEGIN; {_SCHEMA} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;"
            )
        elif version in (2, 3):
            self._upgrade(version)
        elif version != _SCHEMA_VERSION:
            raise InvalidRequest(
                f"{path} was written by another version (schema {version}, this one reads "
                f"{_SCHEMA_VERSION}): name another state file."
            )

    def _upgrade(self, version: int) -> None:
        """Bring a file of an earlier schema to this one."""
        with self._transaction():
            if version == 2:
                self._nest_hand_overs()
            self._add_longest_tokens()
            self._connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    def _nest_hand_overs(self) -> None:
        """Bring the records of schema 2 to schema 3."""
        rows = self._connection.execute("SELECT replica, record FROM replicas").fetchall()
        for name, text in rows:
            record = json.loads(text)
            record["hand_over"] = {
                nested: record.pop(flat) for flat, nested in _FLAT_HAND_OVER.items()
            }
            self._connection.execute(
                "UPDATE replicas SET record = ? WHERE replica = ?", (json.dumps(record), name)
            )

    def _add_longest_tokens(self) -> None:
        """Bring the table of schema 3 to schema 4: of what is deployed nothing is known."""
        columns = self._connection.execute("SELECT name FROM pragma_table_info('deployments')")
        if (_LONGEST_TOKEN,) not in columns.fetchall():
            self._connection.execute(
                f"ALTER TABLE deployments ADD COLUMN {_LONGEST_TOKEN} INTEGER NOT NULL DEFAULT 0"
            )

    def close(self) -> None:
        self._connection.close()

    def deployments(self) -> tuple[StoredDeployment, ...]:
        rows = self._connection.execute(
            "SELECT spec, index_json, longest_token_bytes, deployed_s, deleting"
            " FROM deployments ORDER BY deployed_s"
        )
        return tuple(
            StoredDeployment(
                deployment=_deployment(spec, packed, longest),
                deployed_s=at_s,
                deleting=bool(deleting),
            )
            for spec, packed, longest, at_s, deleting in rows
        )

    def replicas(self) -> tuple[Replica, ...]:
        rows = self._connection.execute("SELECT record FROM replicas ORDER BY deployment, number")
        return tuple(load(Replica, record) for (record,) in rows)

    def counters(self, deployment: str) -> Counters:
        row = self._connection.execute(
            "SELECT last_number, failure_number FROM counters WHERE deployment = ?", (deployment,)
        ).fetchone()
        return Counters(last_number=row[0], failure_number=row[1]) if row else Counters()

    def channel_keys(self, deployment: str) -> ChannelKeys:
        public_key, secret_key = self._connection.execute(
            "SELECT public_key, secret_key FROM deployments WHERE name = ?", (deployment,)
        ).fetchone()
        return ChannelKeys(public_key=public_key, secret_key=secret_key)

    def add_deployment(self, deployment: Deployment, deployed_s: float) -> None:
        packed = zlib.compress(deployment.index.to_json())
        public_key, secret_key = zmq.curve_keypair()
        self._connection.execute(
            "INSERT INTO deployments"
            " (name, spec, index_json, deployed_s, public_key, secret_key, longest_token_bytes)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                deployment.name,
                dump(deployment.spec),
                packed,
                deployed_s,
                public_key.decode(),
                secret_key.decode(),
                deployment.longest_token_bytes,
            ),
        )

    def mark_deleting(self, deployment: str) -> None:
        self._connection.execute(
            "UPDATE deployments SET deleting = 1 WHERE name = ?", (deployment,)
        )

    def drop_deployment(self, deployment: str) -> None:
        with self._transaction():
            self._connection.execute("DELETE FROM deployments WHERE name = ?", (deployment,))
            self._connection.execute("DELETE FROM replicas WHERE deployment = ?", (deployment,))

    def save_replica(self, replica: Replica) -> None:
        self._connection.execute(
            "INSERT OR REPLACE INTO replicas (replica, deployment, number, record)"
            " VALUES (?, ?, ?, ?)",
            (replica.id, replica.deployment, replica.plan.number, dump(replica)),
        )

    def drop_replica(self, replica: str) -> None:
        self._connection.execute("DELETE FROM replicas WHERE replica = ?", (replica,))

    def save_counters(self, deployment: str, counters: Counters) -> None:
        self._connection.execute(
            "INSERT OR REPLACE INTO counters (deployment, last_number, failure_number)"
            " VALUES (?, ?, ?)",
            (deployment, counters.last_number, counters.failure_number),
        )

    def cordoned_nodes(self) -> frozenset[str]:
        rows = self._connection.execute("SELECT node FROM cordoned")
        return frozenset(node for (node,) in rows)

    def save_cordoned_nodes(self, nodes: Set[str]) -> None:
        with self._transaction():
            self._connection.execute("DELETE FROM cordoned")
            self._connection.executemany(
                "INSERT INTO cordoned (node) VALUES (?)", [(node,) for node in sorted(nodes)]
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


def _make_private(path: Path) -> None:
    """Have a file that only its owner may read; SQLite's files beside it get the same mode."""
    if str(path) == ":memory:":
        return
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
    except OSError as error:
        raise InvalidRequest(f"Cannot use state file {path}: {error.strerror}.") from None


def _deployment(spec: str, packed: bytes, longest_token_bytes: int) -> Deployment:
    index = CheckpointIndex.from_json(zlib.decompress(packed))
    return Deployment(
        spec=load(DeploymentSpec, spec),
        model=spec_of(index),
        index=index,
        longest_token_bytes=longest_token_bytes,
    )
