"""A cold start, and what took over from it, as a picture: bars for the terminal, or a Chrome trace.

Pure. Times come from the machines that measured them, in seconds since the Unix epoch; everything
here is relative to the moment the demand was seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table
from rich.text import Text

from paraserve_backend.protocol.names import ReplicaModels, deployment_of
from paraserve_backend.protocol.span_messages import read_span
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.telemetry.spans import Span, SpanName

SCHEDULER = "scheduler"
_MB = 1e6
#: What a row takes besides its bar; the steps with long names are shortened to fit.
_TEXT_WIDTH = 54
_LEAST_BAR_WIDTH = 12
_STYLES: Mapping[SpanName | None, str] = {
    SpanName.PLAN: "yellow",
    SpanName.FETCH: "cyan",
    SpanName.FETCH_FROM: "cyan",
    SpanName.LOAD: "magenta",
    SpanName.HAND_OVER: "green",
}
_OTHER_STYLE = "blue"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineRow:
    """One interval of a cold start; an instant where start and end are the same."""

    #: The node, or "scheduler".
    where: str
    what: str
    #: Of its bar.
    style: str
    start_s: float
    end_s: float
    size_bytes: int = 0
    #: It had not ended when the status was taken; `end_s` is the latest time known.
    is_running: bool = False

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def bytes_per_s(self) -> float | None:
        """Rate of a transfer; None for anything else."""
        if not self.size_bytes or self.duration_s <= 0:
            return None
        return self.size_bytes / self.duration_s


def rows(
    replica: pb.ReplicaStatus, successors: Sequence[pb.ReplicaStatus] = ()
) -> tuple[TimelineRow, ...]:
    """Return what is known of a cold start: the plan, each node's intervals, then the ends.

    After them, the same of what took over from it, and the hand-over.
    """
    origin_s = replica.requested_s
    return (
        *_plan(replica),
        *(row for part in _by_stage(replica) for row in _part_rows(part, origin_s, replica)),
        *_instant(SpanName.ALL_READY, replica.ready_s, origin_s),
        *_instant(SpanName.FIRST_TOKEN, replica.first_token_s, origin_s),
        *(row for successor in successors for row in _successor_rows(successor, origin_s)),
        *_hand_over(replica, origin_s),
    )


def newest(deployments: pb.ClusterStatus | pb.DeploymentStatus) -> pb.ReplicaStatus | None:
    """Return the cold start that was asked for last; a successor where none is known any more."""
    return max(
        _replicas(deployments),
        key=lambda replica: (not replica.succeeds, replica.requested_s),
        default=None,
    )


def successors(
    deployments: pb.ClusterStatus | pb.DeploymentStatus, replica: pb.ReplicaStatus
) -> tuple[pb.ReplicaStatus, ...]:
    """Return what took over from a replica, or is about to; not what failed to."""
    return tuple(
        each
        for each in _replicas(deployments)
        if each.succeeds == replica.replica
        and not each.HasField("failure")
        and (each.ready_s or not each.removed_s)
    )


def _replicas(
    deployments: pb.ClusterStatus | pb.DeploymentStatus,
) -> list[pb.ReplicaStatus]:
    if isinstance(deployments, pb.DeploymentStatus):
        return list(deployments.replicas)
    return [replica for entry in deployments.deployments for replica in entry.replicas]


def render(
    replica: pb.ReplicaStatus, successors: Sequence[pb.ReplicaStatus] = (), *, width: int
) -> Table:
    """Draw the cold start with one bar per row on a common time axis, `width` columns wide."""
    drawn = rows(replica, successors)
    total_s = max((row.end_s for row in drawn), default=0.0)
    bar_width = max(_LEAST_BAR_WIDTH, width - _TEXT_WIDTH)
    table = Table(title=_title(replica), title_justify="left", box=None, pad_edge=False)
    table.add_column("node", no_wrap=True)
    table.add_column("step", no_wrap=True, max_width=20)
    table.add_column(_axis(total_s, bar_width), no_wrap=True, width=bar_width)
    for heading in ("s", "MB", "MB/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = ""
    for row in drawn:
        where = row.where if row.where != before else ""
        table.add_row(where, row.what, _bar(row, total_s, bar_width), *_figures(row))
        before = row.where
    return table


def chrome_trace(
    replica: pb.ReplicaStatus, successors: Sequence[pb.ReplicaStatus] = ()
) -> dict[str, Any]:
    """Return the cold start in Chrome's trace format, for chrome://tracing or Perfetto.

    A node is a process, a kind of step a thread; times are microseconds.
    """
    drawn = rows(replica, successors)
    places = list(dict.fromkeys(row.where for row in drawn))
    lanes = list(dict.fromkeys(row.what for row in drawn))
    names = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": place}}
        for pid, place in enumerate(places)
    ]
    events = [_event(row, places.index(row.where), lanes.index(row.what)) for row in drawn]
    return {"displayTimeUnit": "ms", "traceEvents": [*names, *events]}


def _plan(replica: pb.ReplicaStatus) -> Iterator[TimelineRow]:
    if replica.planned_s:
        origin_s = replica.requested_s
        planned = Span(name=SpanName.PLAN, start_s=origin_s, end_s=replica.planned_s)
        yield _row(SCHEDULER, planned, origin_s)


def _by_stage(replica: pb.ReplicaStatus) -> list[pb.ReplicaPart]:
    return sorted(replica.parts, key=lambda part: part.layer_start)


def _part_rows(
    part: pb.ReplicaPart, origin_s: float, replica: pb.ReplicaStatus
) -> Iterator[TimelineRow]:
    spans = sorted(map(read_span, part.status.spans), key=lambda span: span.start_s)
    known_s = max((max(span.start_s, span.end_s) for span in spans), default=origin_s)
    models = ReplicaModels(replica.replica)
    for span in spans:
        fetched_bytes = part.status.fetched_bytes if span.name is SpanName.FETCH else 0
        shown = replace(
            span,
            detail=models.short(span.detail),
            end_s=span.end_s or known_s,
            size_bytes=span.size_bytes or fetched_bytes,
        )
        yield _row(part.node, shown, origin_s, is_running=not span.end_s)
    if part.status.phase == pb.READY:
        layers = f"[{part.layer_start}, {part.layer_end})"
        ready = Span(name=SpanName.READY, detail=layers, start_s=known_s, end_s=known_s)
        yield _row(part.node, ready, origin_s)


def _successor_rows(replica: pb.ReplicaStatus, origin_s: float) -> Iterator[TimelineRow]:
    """Its rows, marked with its number: "load generate .2"."""
    mark = replica.replica.removeprefix(deployment_of(replica.replica))
    for part in _by_stage(replica):
        for row in _part_rows(part, origin_s, replica):
            yield replace(row, what=f"{row.what} {mark}")


def _hand_over(replica: pb.ReplicaStatus, origin_s: float) -> Iterator[TimelineRow]:
    if replica.hand_over_begin_s:
        span = Span(
            name=SpanName.HAND_OVER,
            start_s=replica.hand_over_begin_s,
            end_s=replica.hand_over_end_s or replica.hand_over_begin_s,
        )
        yield _row(SCHEDULER, span, origin_s, is_running=not replica.hand_over_end_s)


def _instant(name: SpanName, at_s: float, origin_s: float) -> Iterator[TimelineRow]:
    if at_s:
        yield _row(SCHEDULER, Span(name=name, start_s=at_s, end_s=at_s), origin_s)


def _row(where: str, span: Span, origin_s: float, *, is_running: bool = False) -> TimelineRow:
    return TimelineRow(
        where=where,
        what=span.label,
        style=_STYLES.get(span.name, _OTHER_STYLE),
        start_s=span.start_s - origin_s,
        end_s=span.end_s - origin_s,
        size_bytes=span.size_bytes,
        is_running=is_running,
    )


def _title(replica: pb.ReplicaStatus) -> str:
    stages = len(replica.parts)
    title = f"Cold start of {replica.replica}: {stages} stage{'' if stages == 1 else 's'}"
    if replica.first_token_s:
        title += f", first token after {replica.first_token_s - replica.requested_s:.2f} s"
    if replica.hand_over_end_s:
        title += f", handed over after {replica.hand_over_end_s - replica.requested_s:.2f} s"
    return title


def _axis(total_s: float, width: int) -> str:
    end = f"{total_s:.1f} s"
    return f"0{end:>{width - 1}}"


def _bar(row: TimelineRow, total_s: float, width: int) -> Text:
    scale = width / total_s if total_s > 0 else 0.0
    start = min(width - 1, max(0, round(row.start_s * scale)))
    end = min(width, round(row.end_s * scale))
    if row.start_s == row.end_s:
        return Text(" " * start + "◆", style="bold green")
    mark = "░" if row.is_running else "█"
    return Text(" " * start + mark * max(1, end - start), style=row.style)


def _figures(row: TimelineRow) -> tuple[str, str, str]:
    seconds = row.end_s if row.start_s == row.end_s else row.duration_s
    size = f"{row.size_bytes / _MB:.1f}" if row.size_bytes else ""
    rate = f"{row.bytes_per_s / _MB:.0f}" if row.bytes_per_s else ""
    return f"{seconds:.2f}", size, rate


def _event(row: TimelineRow, pid: int, lane: int) -> dict[str, Any]:
    event: dict[str, Any] = {
        "name": row.what,
        "pid": pid,
        "tid": lane,
        "ts": round(row.start_s * 1e6),
    }
    if row.start_s == row.end_s:
        return event | {"ph": "i", "s": "g" if row.where == SCHEDULER else "p"}
    return event | {
        "ph": "X",
        "dur": round(row.duration_s * 1e6),
        "args": {"bytes": row.size_bytes} if row.size_bytes else {},
    }
