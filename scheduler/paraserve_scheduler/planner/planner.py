"""The cheapest way to start one replica that meets its objectives, or the best way there is. Pure.

Every number of stages is tried with the places that would have the model earliest, zones included.
The seconds come from `cost`, `bandwidth`, `candidates` and `partition`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

from paraserve_scheduler.planner.bandwidth import offered_rate
from paraserve_scheduler.planner.candidates import (
    EXACT_CANDIDATES,
    Candidate,
    Candidates,
    find_layer_sources,
    find_rooms,
)
from paraserve_scheduler.planner.cost import ModelShape
from paraserve_scheduler.planner.decisions import Prediction, StageChoice, Start
from paraserve_scheduler.planner.fleet import Fleet, Gpu, Need, Node, Objectives
from paraserve_scheduler.planner.partition import choose_places, cut, divisible_s
from paraserve_scheduler.planner.prediction import predict, tpot_s

#: Without an objective a start in one zone may take so many times as long.
_ZONE_SLACK = 1.05
#: Where every plan misses the objective, one may take so many times as long as the earliest.
_LATE_SLACK = 1.1


def plan(need: Need, fleet: Fleet, now_s: float, *, replicas: int = 1) -> Start | None:
    """How to start one replica that can grow into `replicas`; None while there is no room.

    Of the plans that meet both objectives it takes the cheapest; of those that meet one or none,
    the one with the earliest first token among those that meet the TPOT objective, if any does.
    Nodes where one more fetch would make a running one late are used only if nothing else is left.
    All stages go into one zone where that misses nothing.
    """
    if need.must_grow and not fleet.has_room(need.model.full_bytes):
        return None
    search = _Search(need, fleet, now_s, replicas)
    able = [node for node in fleet.nodes if need.may_use(node)]
    free = [node for node in able if _takes_one_more(node, need, now_s)]
    best = search.best(free)
    if best is None and len(free) < len(able):
        free = able
        best = search.best(free)
    zones = _zones(best, free)
    for zone in zones if len(zones) > 1 else ():
        near = search.best([node for node in free if node.zone == zone])
        if near is not None and best is not None and _is_as_good(near, best, need):
            return near
    return best


def _takes_one_more(node: Node, need: Need, now_s: float) -> bool:
    """Whether a start there makes no running fetch late."""
    if not node.claims or offered_rate(node.nic_bytes_per_s, node.claims, now_s) > 0:
        return True
    # What is there already is not fetched.
    return node.cached.get(need.weights) == ((0, need.model.num_layers),)


def _zones(start: Start | None, nodes: Sequence[Node]) -> list[str]:
    """The zones of its stages, those of most stages first; none if one is not known.

    Nor if it misses an objective: then nothing must make it any later.
    """
    if start is None or len(start.stages) == 1 or not _meets(start):
        return []
    used = {stage.node for stage in start.stages}
    counts = Counter(node.zone for node in nodes if node.name in used)
    return [zone for zone, _ in counts.most_common()] if "" not in counts else []


def _is_as_good(near: Start, best: Start, need: Need) -> bool:
    """Whether the one in a single zone misses nothing that the other does not."""
    if not _meets(near) or need.objectives.ttft_s is not None:
        return _meets(near)
    is_parallel = len(near.stages) == len(best.stages)
    return is_parallel and _predicted(near).ready_s <= _predicted(best).ready_s * _ZONE_SLACK


class _Search:
    """The search for the start of one replica, over any of the fleet's nodes."""

    def __init__(self, need: Need, fleet: Fleet, now_s: float, replicas: int) -> None:
        self._need = need
        self._now_s = now_s
        self._replicas = replicas
        self._candidates = Candidates(need, find_layer_sources(need, fleet))

    def best(self, nodes: Sequence[Node]) -> Start | None:
        """Return the best start on `nodes`; None while there is no room."""
        need = self._need
        rooms = find_rooms(need, nodes)
        if need.must_grow and not any(room.free_bytes >= need.model.full_bytes for room in rooms):
            return None
        options: list[Start] = []
        for stages in range(1, min(need.max_stages, len(nodes), need.model.num_layers) + 1):
            candidates = self._candidates.find(rooms, stages)
            for full in range(1, min(stages, self._replicas) + 1):
                options += self._options(candidates, stages, full)
            # One more stage holds more memory for as long: what it fetches sooner, the head fetches
            # later to become whole.
            best = _choose(options, need)
            is_enough = best is not None and len(best.stages) >= min(self._replicas, stages)
            is_soon = best is not None and need.objectives.ttft_s is not None and _meets(best)
            if is_enough and is_soon:
                break
        return _choose(options, need)

    def _options(self, candidates: Sequence[Candidate], stages: int, full: int) -> Iterator[Start]:
        if stages == 1:
            for candidate in _soonest_by_kind(self._need, candidates):
                yield self._start((candidate,), (0, self._need.model.num_layers), 1)
            return
        for group in self._by_speed(candidates, stages, full):
            yield from self._pipelines(group, stages, full)

    def _by_speed(
        self, candidates: Sequence[Candidate], stages: int, full: int
    ) -> Iterator[Sequence[Candidate]]:
        """First the places of kinds fast enough for the TPOT objective, then all."""
        model, limit_s = self._need.model, self._need.objectives.tpot_s
        if limit_s is not None:
            able = [
                candidate
                for candidate in candidates
                if tpot_s(model, [candidate], stages, full) <= limit_s
            ]
            if stages <= len(able) < len(candidates):
                yield able
        yield candidates

    def _pipelines(
        self, candidates: Sequence[Candidate], stages: int, full: int
    ) -> Iterator[Start]:
        model = self._need.model
        for places in _places(candidates, model, stages, full):
            able = frozenset(i for i, candidate in enumerate(places) if candidate.can_grow)
            bound_s = divisible_s(places, model.total_bytes)
            found = cut(places, model.num_layers, heads=able, not_before_s=bound_s)
            if found is not None and found.latest_s < float("inf"):
                yield self._start(found.places, found.bounds, full)

    def _start(self, candidates: Sequence[Candidate], bounds: Sequence[int], full: int) -> Start:
        need = self._need
        growing = _growing(candidates, full)
        chosen = [
            _stage(candidate, start, end, need.must_grow and candidate in growing)
            for candidate, start, end in zip(candidates, bounds, bounds[1:], strict=False)
        ]
        prediction = predict(need, candidates, chosen, self._now_s)
        return Start(
            deployment=need.name,
            stages=tuple(chosen),
            reason=_reason(need, chosen, prediction),
            prediction=prediction,
            deadline_s=_deadline(need, self._now_s),
            keeps_in_memory=True,
        )


def _meets(start: Start) -> bool:
    prediction = start.prediction
    return prediction is not None and prediction.meets_ttft and prediction.meets_tpot


def _choose(options: Sequence[Start], need: Need) -> Start | None:
    """The best of them; of those that are late anyway, the cheapest that is hardly any later."""
    best = min(options, key=lambda option: _preference(option, need), default=None)
    if best is None or _meets(best) or need.objectives.ttft_s is None:
        return best
    limit_s = _predicted(best).ready_s * _LATE_SLACK
    is_slow = not _predicted(best).meets_tpot
    able = [
        option
        for option in options
        if _predicted(option).ready_s <= limit_s and (is_slow or _predicted(option).meets_tpot)
    ]
    return min(able, key=lambda option: _predicted(option).cost_byte_s)


def _predicted(start: Start) -> Prediction:
    assert start.prediction is not None, "every option is predicted"
    return start.prediction


def _preference(start: Start, need: Need) -> tuple[bool, bool, float, float]:
    prediction = _predicted(start)
    if need.objectives.ttft_s is None:
        # Nobody says how soon is soon enough: as parallel as it may be, of those what becomes most
        # instances, and of those the earliest.
        is_slow = not prediction.meets_tpot
        grown = sum(stage.grows for stage in start.stages)
        return (is_slow, is_slow, -len(start.stages) - grown / 1000, prediction.ready_s)
    meets = prediction.meets_ttft and prediction.meets_tpot
    value = prediction.cost_byte_s if meets else prediction.ttft_s
    return (not meets, not prediction.meets_tpot, value, len(start.stages))


def _soonest_by_kind(need: Need, candidates: Sequence[Candidate]) -> Iterable[Candidate]:
    """Of one kind the place that is ready first is the best for the whole model in all respects."""
    found: dict[str, tuple[float, Candidate]] = {}
    for candidate in candidates:
        if candidate.can_grow:
            ready_s, kind = candidate.ready_s(0, need.model.num_layers), candidate.node.kind.name
            if ready_s < found.get(kind, (float("inf"), candidate))[0]:
                found[kind] = (ready_s, candidate)
    return [candidate for _, candidate in found.values()]


def _places(
    candidates: Sequence[Candidate], model: ModelShape, stages: int, full: int
) -> Iterable[tuple[Candidate, ...]]:
    """The places to cut the model over: of a few every choice, of many the best by bytes."""
    if len(candidates) > EXACT_CANDIDATES:
        heads = frozenset(i for i, candidate in enumerate(candidates) if candidate.can_grow)
        places = choose_places(candidates, model.total_bytes, stages, heads=heads, full=full)
        return [] if places is None else [places]
    # Of orders that are equally early `cut` takes the first, and the head has most to fetch later.
    choices = combinations(sorted(candidates, key=_slowness), stages)
    return [chosen for chosen in choices if sum(candidate.can_grow for candidate in chosen) >= full]


def _growing(candidates: Sequence[Candidate], full: int) -> list[Candidate]:
    """The head, and of the others those that can grow and fetch fastest."""
    able = [candidate for candidate in candidates[1:] if candidate.can_grow]
    able.sort(key=_slowness)
    return [candidates[0], *able[: full - 1]]


def _slowness(candidate: Candidate) -> float:
    return -candidate.forecast.bytes_in(10.0)


def _stage(candidate: Candidate, start: int, end: int, grows: bool) -> StageChoice:
    model = candidate.model
    reserved = model.full_bytes if grows else model.reserved_bytes(start, end)
    gpu = _best_fit(candidate.node.gpus, reserved)
    return StageChoice(
        node=candidate.node.name,
        gpu=gpu.index,
        start=start,
        end=end,
        reserved_bytes=reserved,
        grows=grows,
        uses_slot=gpu.slots > 0,
        sources=tuple(candidate.sources(start, end)),
    )


def _best_fit(gpus: Sequence[Gpu], size_bytes: int) -> Gpu:
    """Of the GPUs with room, one with a slot if there is one, then the one with least room."""
    fitting = [gpu for gpu in gpus if gpu.free_bytes >= size_bytes]
    return min(fitting, key=lambda gpu: (gpu.slots == 0, gpu.free_bytes, gpu.index))


def _deadline(need: Need, now_s: float) -> float | None:
    if need.objectives.ttft_s is None:
        return None
    return (need.oldest_s if need.oldest_s is not None else now_s) + need.objectives.ttft_s


def _reason(need: Need, stages: Sequence[StageChoice], prediction: Prediction) -> str:
    where = ", ".join(f"[{stage.start}, {stage.end}) on {stage.node}" for stage in stages)
    if need.objectives == Objectives():
        verdict = "it has no objectives"
    elif prediction.meets_ttft and prediction.meets_tpot:
        verdict = "the cheapest that meets its objectives"
    else:
        verdict = "no plan meets its objectives, this is the best"
    waiting = "1 waits" if need.waiting == 1 else f"{need.waiting} wait"
    return f"{waiting}: layers {where}; ready in {prediction.ready_s:.2f} s, {verdict}"
