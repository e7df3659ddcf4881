"""The cheapest way to start a replica that meets its objectives, or the best there is. Pure.

Every number of stages is tried with the places that would have the model earliest; what each is
predicted to take comes from `cost`, `contention` and `partition`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from paraserve_scheduler.contention import offered_rate
from paraserve_scheduler.cost import (
    ModelShape,
    Speed,
    decode_s,
    prefill_s,
)
from paraserve_scheduler.fleet import (
    Fleet,
    Gpu,
    Growth,
    Need,
    Node,
    Prediction,
    Source,
    StageChoice,
    Start,
)
from paraserve_scheduler.partition import choose_places, cut
from paraserve_scheduler.spots import Room, Spot, find_spots, find_supply


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningConfig:
    #: Part of the TTFT objective that a prediction may take; the rest is for what it misses.
    ttft_share: float = 0.9
    #: Sequences in a batch that the TPOT objective is checked with.
    tpot_batch: int = 4
    #: Fetched layers stay in host memory when their replica goes.
    keeps_in_memory: bool = True
    #: Growing stages fetch only with what starts leave. Where the network is always busy with
    #: starts, pipelines then stay pipelines, and what holds their memory is slow.
    grows_in_background: bool = False


def plan(
    need: Need, fleet: Fleet, now_s: float, *, replicas: int = 1, config: PlanningConfig
) -> Start | None:
    """How to start one replica that can grow into `replicas`; None while there is no room.

    Of the plans that meet both objectives it takes the cheapest; of those that meet one or none,
    the one with the earliest first token among those that meet the TPOT objective, if any does.
    Nodes where one more fetch would make a running one late are used only if nothing else is left.
    """
    free = [node for node in fleet.nodes if _offers(node, now_s)]
    best = _best(need, fleet, free, now_s, replicas, config)
    if best is None and len(free) < len(fleet.nodes):
        best = _best(need, fleet, fleet.nodes, now_s, replicas, config)
    return best


def _offers(node: Node, now_s: float) -> bool:
    return offered_rate(node.nic_bytes_per_s, node.claims, now_s) > 0


def _best(
    need: Need,
    fleet: Fleet,
    nodes: Sequence[Node],
    now_s: float,
    replicas: int,
    config: PlanningConfig,
) -> Start | None:
    rooms = [Room(node=node, free_bytes=max(it.free_bytes for it in node.gpus)) for node in nodes]
    if not any(room.free_bytes >= need.model.full_bytes for room in rooms):
        return None
    supply = find_supply(need, fleet)
    best: Start | None = None
    for stages in range(1, min(need.max_stages, len(nodes), need.model.num_layers) + 1):
        spots = find_spots(need, rooms, stages, supply)
        for full in range(1, min(stages, replicas) + 1):
            for option in _options(need, spots, stages, full, now_s, config):
                if best is None or _preference(option) < _preference(best):
                    best = option
        # One more stage holds more memory for as long: what it fetches sooner, the head fetches
        # later to become whole.
        if best is not None and _meets(best) and len(best.stages) >= min(replicas, stages):
            break
    return best


def _meets(start: Start) -> bool:
    prediction = start.prediction
    return prediction is not None and prediction.meets_ttft and prediction.meets_tpot


def _preference(start: Start) -> tuple[bool, bool, float, int]:
    prediction = start.prediction
    assert prediction is not None, "every option is predicted"
    meets = prediction.meets_ttft and prediction.meets_tpot
    value = prediction.cost_byte_s if meets else prediction.ttft_s
    return (not meets, not prediction.meets_tpot, value, len(start.stages))


def _options(
    need: Need,
    spots: Sequence[Spot],
    stages: int,
    full: int,
    now_s: float,
    config: PlanningConfig,
) -> Iterator[Start]:
    heads = [spot for spot in spots if spot.can_grow]
    if stages == 1:
        for spot in heads:
            yield _start(need, (spot,), (0, need.model.num_layers), 1, now_s, config)
        return
    places = choose_places(
        spots,
        need.model.total_bytes,
        stages,
        heads=frozenset(i for i, spot in enumerate(spots) if spot.can_grow),
        full=full,
    )
    if places is None:
        return
    able = frozenset(i for i, spot in enumerate(places) if spot.can_grow)
    found = cut(places, need.model.num_layers, heads=able)
    if found is not None and found.latest_s < float("inf"):
        yield _start(need, found.places, found.bounds, full, now_s, config)


def _start(
    need: Need,
    spots: Sequence[Spot],
    bounds: Sequence[int],
    full: int,
    now_s: float,
    config: PlanningConfig,
) -> Start:
    growing = _growing(spots, full)
    chosen = [
        _stage(spot, start, end, spot in growing)
        for spot, start, end in zip(spots, bounds, bounds[1:], strict=False)
    ]
    prediction = _predict(need, spots, chosen, now_s, config)
    return Start(
        deployment=need.name,
        stages=tuple(chosen),
        reason=_reason(need, chosen, prediction),
        prediction=prediction,
        deadline_s=_deadline(need, now_s),
        keeps_in_memory=config.keeps_in_memory,
        growth=Growth(is_background=config.grows_in_background),
    )


def _growing(spots: Sequence[Spot], full: int) -> list[Spot]:
    """The head, and of the others those that can grow and fetch fastest."""
    able = [spot for spot in spots[1:] if spot.can_grow]
    able.sort(key=lambda spot: -spot.forecast.bytes_in(10.0))
    return [spots[0], *able[: full - 1]]


def _stage(spot: Spot, start: int, end: int, grows: bool) -> StageChoice:
    model = spot.model
    reserved = model.full_bytes if grows else model.reserved_bytes(start, end)
    gpu = _best_fit(spot.node.gpus, reserved)
    missing = spot.missing_bytes(start, end)
    local = model.bytes_of(start, end) - missing
    sources = (
        Source(size_bytes=local, peer=spot.node.name),
        Source(size_bytes=missing, peer=spot.peer),
    )
    return StageChoice(
        node=spot.node.name,
        gpu=gpu.index,
        start=start,
        end=end,
        reserved_bytes=reserved,
        grows=grows,
        uses_slot=gpu.slots > 0,
        sources=tuple(source for source in sources if source.size_bytes),
    )


def _best_fit(gpus: Sequence[Gpu], size_bytes: int) -> Gpu:
    """Of the GPUs with room, one with a slot if there is one, then the one with least room."""
    fitting = [gpu for gpu in gpus if gpu.free_bytes >= size_bytes]
    return min(fitting, key=lambda gpu: (gpu.slots == 0, gpu.free_bytes, gpu.index))


def _predict(
    need: Need,
    spots: Sequence[Spot],
    stages: Sequence[StageChoice],
    now_s: float,
    config: PlanningConfig,
) -> Prediction:
    count, full = len(stages), sum(stage.grows for stage in stages)
    ready = max(
        spot.ready_s(stage.start, stage.end) for spot, stage in zip(spots, stages, strict=True)
    )
    speed, hop = slowest(need.model, spots)
    first = prefill_s(speed, need.prompt_tokens, stages=count, full=full, hop_s=hop)
    waited = now_s - need.oldest_s if need.oldest_s is not None else 0.0
    tpot = decode_s(speed, config.tpot_batch, stages=count, full=full, hop_s=hop)
    ttft = waited + ready + first
    objectives = need.objectives
    return Prediction(
        ready_s=ready,
        ttft_s=ttft,
        tpot_s=tpot,
        cost_byte_s=_cost_byte_s(spots, stages, ready),
        meets_ttft=objectives.ttft_s is None
        or waited + (ready + first) / config.ttft_share <= objectives.ttft_s,
        meets_tpot=objectives.tpot_s is None or tpot <= objectives.tpot_s,
    )


def slowest(model: ModelShape, spots: Sequence[Spot]) -> tuple[Speed, float]:
    """The speed a pipeline over these places has: that of its slowest."""
    kinds = [spot.node.kind for spot in spots]
    speed = max((kind.speeds[model.name] for kind in kinds), key=lambda it: it.decode_s)
    return speed, max(kind.hop_s for kind in kinds)


def _cost_byte_s(spots: Sequence[Spot], stages: Sequence[StageChoice], ready_s: float) -> float:
    """GPU memory · time from the command until every growing stage is a full instance."""
    grown_s = max(
        (_grow_s(spot, stage) for spot, stage in zip(spots, stages, strict=True) if stage.grows),
        default=0.0,
    )
    reserved = sum(stage.reserved_bytes for stage in stages)
    return reserved * (ready_s + grown_s)


def _grow_s(spot: Spot, stage: StageChoice) -> float:
    """Seconds until a stage has taken in the layers it lacks."""
    layers = spot.model.num_layers
    lacking = spot.missing_bytes(0, stage.start) + spot.missing_bytes(stage.end, layers)
    rest = spot.model.total_bytes - spot.model.bytes_of(stage.start, stage.end)
    return spot.forecast.seconds_for(lacking) + rest * spot.node.kind.start.load_s_per_byte


def _deadline(need: Need, now_s: float) -> float | None:
    if need.objectives.ttft_s is None:
        return None
    return (need.oldest_s if need.oldest_s is not None else now_s) + need.objectives.ttft_s


def _reason(need: Need, stages: Sequence[StageChoice], prediction: Prediction) -> str:
    where = ", ".join(f"[{stage.start}, {stage.end}) on {stage.node}" for stage in stages)
    verdict = (
        "meets its objectives"
        if prediction.meets_ttft and prediction.meets_tpot
        else ("no plan meets its objectives; this is the best")
    )
    return f"{need.waiting} wait: {where}; TTFT {prediction.ttft_s:.2f} s predicted, {verdict}"
