"""What a start is expected to give: time to first token, time per token, memory held. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from paraserve_scheduler.planner.candidates import Candidate
from paraserve_scheduler.planner.cost import (
    ModelShape,
    decode_s,
    full_speed_stages,
    prefill_s,
    runtime_s,
    slowest,
)
from paraserve_scheduler.planner.decisions import Prediction, StageChoice, StagePrediction
from paraserve_scheduler.planner.fleet import Need

#: Part of the TTFT objective that a prediction may take; the rest is for what it misses.
TTFT_SHARE = 0.9
#: Sequences in a batch that the TPOT objective is checked with.
TPOT_BATCH = 4


def predict(
    need: Need,
    candidates: Sequence[Candidate],
    stages: Sequence[StageChoice],
    now_s: float,
) -> Prediction:
    """Return what `stages` on `candidates` are expected to give."""
    parts = tuple(
        _predict_stage(candidate, stage)
        for candidate, stage in zip(candidates, stages, strict=True)
    )
    ready = max(part.ready_s for part in parts)
    count = len(stages)
    growing = sum(stage.grows for stage in stages)
    kinds = [candidate.node.kind for candidate in candidates]
    speed, hop = slowest(kinds, need.model.name)
    full = full_speed_stages(kinds, count, growing)
    first = prefill_s(speed, need.prompt_tokens, stages=count, full=full, hop_s=hop)
    waited = now_s - need.oldest_s if need.oldest_s is not None else 0.0
    tpot = tpot_s(need.model, candidates, count, growing)
    ttft = waited + ready + first
    objectives = need.objectives
    return Prediction(
        ready_s=ready,
        ttft_s=ttft,
        tpot_s=tpot,
        cost_byte_s=_cost_byte_s(candidates, stages, ready),
        meets_ttft=_is_in_time(waited, (ready + first) / TTFT_SHARE, objectives.ttft_s),
        meets_tpot=objectives.tpot_s is None or tpot <= objectives.tpot_s,
        stages=parts,
    )


def _is_in_time(waited_s: float, start_s: float, ttft_slo_s: float | None) -> bool:
    """Whether a start is soon enough for who waits, or if that is late already, who comes now."""
    if ttft_slo_s is None:
        return True
    return (waited_s if waited_s < ttft_slo_s else 0.0) + start_s <= ttft_slo_s


def _predict_stage(candidate: Candidate, stage: StageChoice) -> StagePrediction:
    local = sum(source.size_bytes for source in stage.sources if source.peer == stage.node)
    store = sum(source.size_bytes for source in stage.sources if source.peer is None)
    return StagePrediction(
        runtime_s=runtime_s(candidate.node.kind.start, has_slot=stage.uses_slot),
        fetch_s=candidate.fetch_s(stage.start, stage.end),
        ready_s=candidate.ready_s(stage.start, stage.end),
        local_bytes=local,
        peer_bytes=sum(source.size_bytes for source in stage.sources) - local - store,
        store_bytes=store,
        uses_slot=stage.uses_slot,
    )


def tpot_s(model: ModelShape, candidates: Sequence[Candidate], stages: int, growing: int) -> float:
    """Seconds per token of a pipeline, `growing` of whose stages are full workers."""
    kinds = [candidate.node.kind for candidate in candidates]
    speed, hop = slowest(kinds, model.name)
    full = full_speed_stages(kinds, stages, growing)
    return decode_s(speed, TPOT_BATCH, stages=stages, full=full, hop_s=hop)


def _cost_byte_s(
    candidates: Sequence[Candidate], stages: Sequence[StageChoice], ready_s: float
) -> float:
    """GPU memory · time from the command until every growing stage is a full instance."""
    grown_s = max(
        (
            _grow_s(candidate, stage)
            for candidate, stage in zip(candidates, stages, strict=True)
            if stage.grows
        ),
        default=0.0,
    )
    reserved = sum(stage.reserved_bytes for stage in stages)
    return reserved * (ready_s + grown_s)


def _grow_s(candidate: Candidate, stage: StageChoice) -> float:
    """Seconds until a stage has taken in the layers it lacks."""
    rest = candidate.model.total_bytes - candidate.model.bytes_of(stage.start, stage.end)
    load_s = rest * candidate.node.kind.start.load_s_per_byte
    return candidate.rest_fetch_s(stage.start, stage.end) + load_s
