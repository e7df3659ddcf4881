"""The text of `paraserve explain`: what was predicted for a start, beside what happened. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from rich.table import Table

from paraserve_backend.protocol.span_messages import read_span
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.state.learned import StageTimes, stage_times

_MB = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One duration in seconds; None where it is not known."""

    what: str
    predicted_s: float | None
    happened_s: float | None

    @property
    def error(self) -> float | None:
        """By how much of what happened the prediction was too high."""
        if self.predicted_s is None or not self.happened_s:
            return None
        return self.predicted_s / self.happened_s - 1


def comparisons(replica: pb.ReplicaStatus) -> tuple[Comparison, ...]:
    """The replica as a whole, from the plan on; the first token from the request on."""
    known = replica.prediction if replica.HasField("prediction") else None
    return (
        Comparison(
            what="all stages ready",
            predicted_s=known.ready_s if known else None,
            happened_s=_since(replica.planned_s, replica.ready_s),
        ),
        Comparison(
            what="first token",
            predicted_s=known.ttft_s if known else None,
            happened_s=_since(replica.requested_s, replica.first_token_s),
        ),
        Comparison(
            what="time per token",
            predicted_s=known.tpot_s if known else None,
            happened_s=replica.tpot_s or None,
        ),
    )


def times_of(part: pb.ReplicaPart) -> StageTimes:
    """How one stage's start went."""
    return stage_times(map(read_span, part.status.spans), part.status.fetched_bytes)


def render(replica: pb.ReplicaStatus) -> Iterator[str | Table]:
    """What there is to say, line by line and table by table."""
    yield f"{replica.replica}: {replica.reason or 'started before its scheduler was'}"
    if replica.succeeds:
        yield f"It takes over from {replica.succeeds}."
    if not replica.HasField("prediction"):
        yield "Nothing was predicted: successors are started by rule."
    yield _whole(replica)
    yield _stages(replica)


def _whole(replica: pb.ReplicaStatus) -> Table:
    table = _table("", "PREDICTED S", "HAPPENED S", "ERROR")
    for entry in comparisons(replica):
        error = "" if entry.error is None else f"{entry.error:+.0%}"
        table.add_row(entry.what, _number(entry.predicted_s), _number(entry.happened_s), error)
    return table


def _stages(replica: pb.ReplicaStatus) -> Table:
    table = _table("NODE", "LAYERS", "MB FROM", "PROCESS S", "FETCH S", "READY S")
    for part, stage in zip_longest(replica.parts, replica.prediction.stages):
        times = times_of(part)
        table.add_row(
            part.node,
            f"[{part.layer_start}, {part.layer_end})".replace("[", r"\["),
            _sources(stage),
            _pair(stage and stage.runtime_s, times.runtime_s),
            _pair(stage and stage.fetch_s, times.fetch_s),
            _pair(stage and stage.ready_s, times.ready_s),
        )
    table.caption = "predicted / happened, each from the stage's own begin on"
    return table


def _sources(stage: pb.StagePrediction | None) -> str:
    if stage is None:
        return ""
    sizes = {"memory": stage.local_bytes, "peers": stage.peer_bytes, "store": stage.store_bytes}
    said = [f"{size / _MB:.0f} {name}" for name, size in sizes.items() if size]
    return ", ".join(said + (["a slot"] if stage.uses_slot else []))


def _pair(predicted: float | None, happened: float | None) -> str:
    return f"{_number(predicted) or '-'} / {_number(happened) or '-'}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _since(begin_s: float, end_s: float) -> float | None:
    return end_s - begin_s if end_s else None


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, caption_justify="left")
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table
