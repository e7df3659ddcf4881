"""The simulated cluster and its deployments, read from a YAML file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paraserve_backend.daemon.settings import load_config
from paraserve_backend.errors import InvalidRequest
from paraserve_scheduler.planner.cost import (
    ModelShape,
    NodeKind,
    Speed,
    StartMethod,
    uniform_model,
)
from paraserve_scheduler.planner.fleet import Objectives
from paraserve_scheduler.simulator.workload import Lengths, Tokens
from paraserve_scheduler.state.waiting import MAX_WAITING

_GB = 10**9
_BYTES_PER_GBIT = 1e9 / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFile:
    """How one kind of worker process starts; see `cost.StartMethod`."""

    name: str
    runtime_s: float
    tail_s: float
    load_s_per_gb: float
    pipeline_setup_s: float = 0.0
    is_overlapped: bool = True
    slot_runtime_s: float | None = None
    slot_gb: float = 0.0
    is_instant: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedFile:
    model: str
    prefill_s_per_1000: float
    decode_s: float
    decode_s_per_sequence: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KindFile:
    name: str
    workers: tuple[WorkerFile, ...]
    speeds: tuple[SpeedFile, ...]
    hop_s: float = 0.001
    #: False: each replica runs at the device's whole speed.
    shares_gpus: bool = True
    #: Reads of weights.
    disk_gb_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFile:
    """One node, or `count` alike whose names get numbers."""

    name: str
    kind: str
    nic_gbit: float
    gpus: int
    gpu_gb: float
    #: Host memory for weights.
    memory_gb: float
    #: Disk for weights that host memory has no room for.
    disk_gb: float = 0.0
    #: Rack or zone.
    zone: str = ""
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    name: str
    size_gb: float
    num_layers: int
    #: Of the embedding and of the head, each.
    ends_gb: float = 0.0
    kv_gb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentFile:
    """One deployment, or `count` alike whose names get numbers."""

    name: str
    model: str
    application: str = "all"
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    count: int = 1
    max_sequences: int = 8
    max_stages: int = 4
    consolidate: bool = True
    keep_alive_s: float | None = None
    max_waiting: int = MAX_WAITING
    prompt_mean: float = 512.0
    prompt_cv: float = 0.5
    prompt_most: int = 1024
    output_mean: float = 256.0
    output_cv: float = 0.5
    output_most: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureFile:
    """A node that is lost for a while, with all it holds."""

    node: str
    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFile:
    kinds: tuple[KindFile, ...]
    nodes: tuple[NodeFile, ...]
    models: tuple[ModelFile, ...]
    deployments: tuple[DeploymentFile, ...]
    #: What the object store gives in all; unlimited if it is left out.
    store_gbit: float | None = None
    failures: tuple[FailureFile, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDescription:
    name: str
    kind: NodeKind
    nic_bytes_per_s: float
    gpu_bytes: tuple[int, ...]
    memory_bytes: int
    disk_bytes: int = 0
    zone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentDescription:
    name: str
    application: str
    model: ModelShape
    objectives: Objectives
    max_sequences: int
    max_stages: int
    tokens: Tokens
    #: Its pipelines become full instances.
    consolidate: bool = True
    #: Of an idle replica; None: as long as it is worth it.
    keep_alive_s: float | None = None
    #: Requests that its gateway holds for a replica; one more is refused.
    max_waiting: int = MAX_WAITING


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterDescription:
    nodes: tuple[NodeDescription, ...]
    deployments: tuple[DeploymentDescription, ...]
    store_bytes_per_s: float | None
    failures: tuple[FailureFile, ...] = ()


def read_cluster(path: Path, worker: str) -> ClusterDescription:
    """Read a cluster whose nodes start `worker` processes.

    Raises:
        InvalidRequest: the file cannot be read, or names something it does not define.
    """
    return describe(load_config(ClusterFile, path), worker, str(path))


def describe(file: ClusterFile, worker: str, where: str) -> ClusterDescription:
    kinds = {kind.name: _kind(kind, worker, where) for kind in file.kinds}
    models = {model.name: _model(model) for model in file.models}
    nodes = tuple(node for entry in file.nodes for node in _nodes(entry, kinds, where))
    deployments = tuple(
        deployment for entry in file.deployments for deployment in _named(entry, models, where)
    )
    store = None if file.store_gbit is None else file.store_gbit * _BYTES_PER_GBIT
    return ClusterDescription(
        nodes=nodes, deployments=deployments, store_bytes_per_s=store, failures=file.failures
    )


def _kind(kind: KindFile, worker: str, where: str) -> NodeKind:
    """Workers a file does not name start like the first it does."""
    named = {entry.name: entry for entry in kind.workers}
    if not named:
        raise InvalidRequest(f"Node kind '{kind.name}' in {where} names no worker.")
    chosen = named.get(worker) or kind.workers[0]
    return NodeKind(
        name=kind.name,
        start=_start_method(chosen),
        speeds={speed.model: _speed(speed) for speed in kind.speeds},
        hop_s=kind.hop_s,
        shares_gpus=kind.shares_gpus,
        disk_bytes_per_s=kind.disk_gb_per_s * _GB,
    )


def _start_method(worker: WorkerFile) -> StartMethod:
    return StartMethod(
        runtime_s=worker.runtime_s,
        tail_s=worker.tail_s,
        load_s_per_byte=worker.load_s_per_gb / _GB,
        pipeline_setup_s=worker.pipeline_setup_s,
        is_overlapped=worker.is_overlapped,
        slot_runtime_s=worker.slot_runtime_s,
        slot_bytes=round(worker.slot_gb * _GB),
        is_instant=worker.is_instant,
    )


def _speed(speed: SpeedFile) -> Speed:
    return Speed(
        prefill_s_per_token=speed.prefill_s_per_1000 / 1000,
        decode_s=speed.decode_s,
        decode_s_per_sequence=speed.decode_s_per_sequence,
    )


def _model(model: ModelFile) -> ModelShape:
    return uniform_model(
        model.name,
        size_bytes=round(model.size_gb * _GB),
        num_layers=model.num_layers,
        ends_bytes=round(model.ends_gb * _GB),
        kv_bytes=round(model.kv_gb * _GB),
    )


def _names(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}-{number}" for number in range(count)]


def _nodes(entry: NodeFile, kinds: dict[str, NodeKind], where: str) -> Iterator[NodeDescription]:
    if entry.kind not in kinds:
        raise InvalidRequest(f"Node '{entry.name}' in {where} is of no kind '{entry.kind}'.")
    for name in _names(entry.name, entry.count):
        yield NodeDescription(
            name=name,
            kind=kinds[entry.kind],
            nic_bytes_per_s=entry.nic_gbit * _BYTES_PER_GBIT,
            gpu_bytes=(round(entry.gpu_gb * _GB),) * entry.gpus,
            memory_bytes=round(entry.memory_gb * _GB),
            disk_bytes=round(entry.disk_gb * _GB),
            zone=entry.zone,
        )


def _named(
    entry: DeploymentFile, models: dict[str, ModelShape], where: str
) -> Iterator[DeploymentDescription]:
    if entry.model not in models:
        raise InvalidRequest(f"Deployment '{entry.name}' in {where}: no model '{entry.model}'.")
    for name in _names(entry.name, entry.count):
        yield DeploymentDescription(
            name=name,
            application=entry.application,
            model=models[entry.model],
            objectives=Objectives(ttft_s=entry.ttft_slo_s, tpot_s=entry.tpot_slo_s),
            max_sequences=entry.max_sequences,
            max_stages=entry.max_stages,
            consolidate=entry.consolidate,
            keep_alive_s=entry.keep_alive_s,
            max_waiting=entry.max_waiting,
            tokens=Tokens(
                prompt=Lengths(mean=entry.prompt_mean, cv=entry.prompt_cv, most=entry.prompt_most),
                output=Lengths(mean=entry.output_mean, cv=entry.output_cv, most=entry.output_most),
            ),
        )
