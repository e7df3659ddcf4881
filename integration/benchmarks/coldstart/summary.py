"""What bench_coldstart's starts say: medians, the physical limit, targets. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict

from integration.benchmarks.coldstart.variants import Deployed, Variant, Weights
from paraserve_backend.errors import ParaServeError
from paraserve_backend.protocol.span_messages import read_span
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.telemetry.spans import SpanName

_UNMEASURED = (Weights.DISK, Weights.PEER)
#: The steps that make a cold start fast, each on top of those before it.
ABLATION = {
    "status quo": "status-quo",
    "+ prefetch": "prefetch",
    "+ streamed load": "streamed",
    "+ overlapped start": "ours-1",
    "+ slots": "ours-1-slots",
    "+ pipeline": "ours-4-slots",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One cold start."""

    variant: str
    ttft_s: float
    #: The same request again, while the model is there; the quickest of a few.
    warm_ttft_s: float
    token_ids: tuple[int, ...]
    #: Of the largest model process, with what it shares.
    peak_bytes: int
    #: What the scheduler says of it; None where there was no scheduler.
    replica: pb.ReplicaStatus | None = None

    @property
    def bytes_from(self) -> dict[str, int]:
        """What came from the nodes' memory ("tier"), disks, peers and the store."""
        found: dict[str, int] = {}
        for part in self.replica.parts if self.replica is not None else ():
            spans = map(read_span, part.status.spans)
            origins = [span for span in spans if span.name is SpanName.FETCH_FROM]
            for span in origins:
                found[span.detail] = found.get(span.detail, 0) + span.size_bytes
            if not origins:  # nothing is said where all came from the store
                found["store"] = found.get("store", 0) + part.status.total_bytes
        return found

    def to_json(self) -> dict[str, Any]:
        shallow = {field.name: getattr(self, field.name) for field in fields(self)}
        return shallow | {"replica": self.replica and MessageToDict(self.replica)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Start:
        replica = values["replica"] and ParseDict(values["replica"], pb.ReplicaStatus())
        return cls(**values | {"token_ids": tuple(values["token_ids"]), "replica": replica})


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All starts of one run."""

    variants: Sequence[Variant]
    starts: Sequence[Start]
    checkpoint_bytes: Mapping[str, int]
    #: Measured, by nominal Gbit/s.
    link_bytes_per_s: Mapping[float, float]

    def of(self, name: str) -> list[Start]:
        return [start for start in self.starts if start.variant == name]

    def ttft_s(self, name: str) -> float:
        return statistics.median(start.ttft_s for start in self.of(name))

    def forward_s(self, name: str) -> float:
        return statistics.median(start.warm_ttft_s for start in self.of(name))

    def transfer_s(self, variant: Variant) -> float:
        """Its bytes over the summed bandwidth of its nodes; 0 if they are there."""
        if not variant.fetching_gbit:
            return 0.0
        bandwidth = sum(self.link_bytes_per_s[gbit] for gbit in variant.fetching_gbit)
        return self.checkpoint_bytes[variant.checkpoint] / bandwidth

    def limit_s(self, variant: Variant) -> float | None:
        """What no start can be faster than: the transfer, then one forward pass.

        None where the bytes come from disks or peers, whose rates are not measured.
        """
        if variant.weights in _UNMEASURED:
            return None
        return self.transfer_s(variant) + self.forward_s(variant.name)

    def over_limit(self, variant: Variant) -> float | None:
        limit_s = self.limit_s(variant)
        return None if limit_s is None else self.ttft_s(variant.name) / limit_s

    def speedup(self, variant: Variant) -> float | None:
        """Over the status quo on a node like the variant's first."""
        for other in self.variants:
            if other.is_status_quo and _is_comparable(other, variant):
                return self.ttft_s(other.name) / self.ttft_s(variant.name)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A bound on one figure; it holds only where all its variants were run."""

    name: str
    variants: tuple[str, ...]
    bound: float
    is_least: bool
    measure: Callable[[Results], float]

    def is_met(self, value: float) -> bool:
        return value >= self.bound if self.is_least else value <= self.bound


def summary(results: Results, targets: Sequence[Target]) -> dict[str, Any]:
    """Return the last line, without what was asked for.

    Raises:
        ParaServeError: two of our starts gave different tokens.
    """
    _check_tokens(results)
    names = {variant.name for variant in results.variants}
    judged = [target for target in targets if names.issuperset(target.variants)]
    figures = {target.name: target.measure(results) for target in judged}
    missed = [target.name for target in judged if not target.is_met(figures[target.name])]
    return {
        "checkpoint_bytes": dict(results.checkpoint_bytes),
        "link_mb_per_s": {
            f"{gbit:g} Gbit/s": round(rate / 1e6, 1)
            for gbit, rate in results.link_bytes_per_s.items()
        },
        "variants": {variant.name: _figures(results, variant) for variant in results.variants},
        "ablation_ttft_s": {
            step: round(results.ttft_s(name), 2) for step, name in ABLATION.items() if name in names
        },
        "figures": {name: round(value, 3) for name, value in figures.items()},
        "targets": {target.name: target.bound for target in judged},
        "missed": missed,
        "met": not missed,
    }


def _figures(results: Results, variant: Variant) -> dict[str, Any]:
    starts = results.of(variant.name)
    return {
        "ttft_s": [round(start.ttft_s, 2) for start in starts],
        "median_ttft_s": round(results.ttft_s(variant.name), 3),
        "warm_ttft_s": round(results.forward_s(variant.name), 3),
        "limit_s": _rounded(results.limit_s(variant), 3),
        "speedup": _rounded(results.speedup(variant), 2),
        "peak_mb": round(max(start.peak_bytes for start in starts) / 1e6),
        "last_mb_from": {name: round(it / 1e6) for name, it in starts[-1].bytes_from.items()},
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _is_comparable(status_quo: Variant, variant: Variant) -> bool:
    return (
        status_quo.checkpoint == variant.checkpoint
        and status_quo.testbed.gbit[0] == variant.testbed.gbit[0]
    )


def _check_tokens(results: Results) -> None:
    """Stages and sources change nothing; transformers may round bf16 in another order."""
    for checkpoint in results.checkpoint_bytes:
        ours = {
            start.token_ids
            for variant in results.variants
            if isinstance(variant.how, Deployed) and variant.checkpoint == checkpoint
            for start in results.of(variant.name)
        }
        if len(ours) > 1:
            raise ParaServeError(f"Starts of the {checkpoint} checkpoint gave different tokens.")
