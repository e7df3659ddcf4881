"""What a local cluster consists of, and the paths and names of its files; starts nothing.

Durable files are in a state directory; weights and keys are in shared memory. All names in shared
memory start with one prefix, by which leftovers are found and removed here.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from paraserve_backend.errors import InvalidRequest

SHM = Path("/dev/shm")
#: Bucket of the embedded S3 server.
BUCKET = "models"

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLayout:
    """One tritonserver with its agent."""

    name: str
    #: Everything of this node binds to it.
    host: str
    triton_grpc_port: int
    triton_http_port: int
    triton_metrics_port: int
    agent_port: int
    #: Ports [start, end) of the activation channel; disjoint between nodes of one host.
    channel_port_start: int
    channel_port_end: int
    memory_bytes: int
    nic_bytes_per_s: float
    #: Of its agent, beside those that follow from the layout.
    agent_settings: Mapping[str, object] = field(default_factory=dict)
    #: Named network namespace its processes run in; None: that of the supervisor.
    network_namespace: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterLayout:
    name: str
    #: Scheduler, gateway and S3 server bind to it.
    host: str
    scheduler_port: int
    gateway_grpc_port: int
    gateway_http_port: int
    #: None: no embedded S3 server; nodes use the AWS environment that `up` was called with.
    s3_port: int | None
    nodes: tuple[NodeLayout, ...]
    state_dir: Path
    #: OpenMP threads of each model process; the nodes share this machine's cores.
    compute_threads: int
    #: Of the scheduler, beside those that follow from the layout.
    scheduler_settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def files(self) -> ClusterFiles:
        return ClusterFiles(self.state_dir, self.name)

    @property
    def scheduler_address(self) -> str:
        return f"{self.host}:{self.scheduler_port}"

    @property
    def gateway_address(self) -> str:
        """Host and port of the gateway's gRPC service."""
        return f"{self.host}:{self.gateway_grpc_port}"

    @property
    def s3_url(self) -> str | None:
        return f"http://{self.host}:{self.s3_port}" if self.s3_port else None


class ClusterFiles:
    """Paths of one cluster."""

    def __init__(self, state_dir: Path, name: str) -> None:
        self.state_dir = state_dir
        #: There while the cluster is up and ready.
        self.cluster = state_dir / "cluster.json"
        #: Locked by the supervisor as long as it lives.
        self.lock = state_dir / "supervisor.lock"
        self.logs = state_dir / "logs"
        self.buckets = state_dir / "buckets"
        self.database = state_dir / "scheduler.db"
        self.token = state_dir / "secrets" / "token"
        self.s3_key = state_dir / "secrets" / "s3.json"
        self.config = state_dir / "config"
        # Two state directories may hold clusters of the same name.
        digest = hashlib.sha256(str(state_dir).encode()).hexdigest()[:8]
        self.shm_prefix = f"paraserve-{name}-{digest}-"

    def run_dir(self, node: str) -> Path:
        return SHM / f"{self.shm_prefix}run" / node

    def triton_shm_prefix(self, node: str) -> str:
        return f"{self.shm_prefix}{node}-"

    def model_repository(self, node: str) -> Path:
        return self.state_dir / "nodes" / node / "models"

    @property
    def backend_directory(self) -> Path:
        return self.state_dir / "backends"


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    name: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCluster:
    """What cluster.json holds."""

    layout: ClusterLayout
    supervisor_pid: int
    processes: tuple[Process, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Key:
    access_key: str
    secret_key: str

    def __repr__(self) -> str:
        return "S3Key(...)"


def state_root(environ: Mapping[str, str]) -> Path:
    """Return the folder of all local clusters of this user."""
    base = environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "paraserve"


def check_name(name: str) -> str:
    """Return `name` if a cluster may be called so.

    Raises:
        InvalidRequest: it has other characters than a-z, 0-9 and -, or more than 32.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", name):
        raise InvalidRequest(
            f"{name!r} cannot be the name of a cluster: use up to 32 of a-z, 0-9 and '-'."
        )
    return name


def to_json(record: object) -> bytes:
    return msgspec.json.encode(record, enc_hook=str)  # a path is a string


def from_json(record: type[Record], content: bytes) -> Record:
    """Read what `to_json` wrote; raises `ValueError` for anything else."""
    return msgspec.json.decode(content, type=record, dec_hook=_decoded)


def _decoded(hint: object, value: object) -> object:
    return Path(str(value)) if hint is Path else value


def write_running(path: Path, record: RunningCluster) -> None:
    """Write a record so that readers see it whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.format(to_json(record)))
    temporary.replace(path)


def read_running(path: Path) -> RunningCluster:
    """Read what `write_running` wrote.

    Raises:
        InvalidRequest: there is no such file, or another version wrote it.
    """
    return _read(RunningCluster, path)


def ensure_secrets(files: ClusterFiles) -> None:
    """Make the cluster token and the S3 key pair where they are missing; only their owner reads."""
    files.token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write_once(files.token, secrets.token_urlsafe(32))
    key = S3Key(access_key=secrets.token_hex(10), secret_key=secrets.token_urlsafe(32))
    _write_once(files.s3_key, to_json(key).decode())


def read_s3_key(files: ClusterFiles) -> S3Key:
    return _read(S3Key, files.s3_key)


def _read(record: type[Record], path: Path) -> Record:
    try:
        return from_json(record, path.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"Cannot read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise InvalidRequest(f"{path} was written by another version: {error}.") from None


def _write_once(path: Path, content: str) -> None:
    if path.exists():
        return
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(content)
    temporary.replace(path)


def sweep(shm: Path, prefix: str) -> tuple[str, ...]:
    """Remove everything in `shm` whose name starts with `prefix`; return the names."""
    removed = []
    for path in sorted(shm.glob(f"{prefix}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path.name)
    return tuple(removed)
