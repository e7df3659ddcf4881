"""How long a deployment starts nothing because its starts fail or its replicas die. Pure.

One rule for both: what happens too often costs a pause, which doubles each time and ends with the
habit. What the node was to blame for says nothing about the deployment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from paraserve_scheduler.reconciler.turn import Turn
from paraserve_scheduler.state.records import DeploymentState, Failure, Setback
from paraserve_scheduler.state.view import ClusterView

#: Failures that another try would only repeat.
_PERMANENT = frozenset(
    {
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "UNIMPLEMENTED",
        "FAILED_PRECONDITION",
    }
)
#: A Triton that aborts takes processes along some seconds before it is known to be gone, and its
#: first loads after it is back are no better.
_BEFORE_LOSS_S = 15.0
_AFTER_LOSS_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    #: Nothing is started until then, and at that very moment.
    until_s: float
    #: What requests that wait are told, if waiting is of no use.
    failure: Failure | None


def refusal(turn: Turn, state: DeploymentState) -> Failure | None:
    """What requests that wait for a start of this deployment are told now, if they need not."""
    newest = state.failed_starts[-1] if state.failed_starts else None
    if newest is not None and _is_permanent(newest):
        # Only somebody can repair it, and then wants to see so: whoever comes later, tries.
        tried_just_now = turn.now_s - newest.at_s < turn.config.repair_pause_s
        return newest.failure if tried_just_now else None
    if newest is not None and len(_recent_failures(turn, state)) >= turn.config.max_failed_starts:
        return newest.failure
    pause = pause_of(turn, state)
    return None if pause is None else pause.failure


def pause_of(turn: Turn, state: DeploymentState) -> Pause | None:
    """The pause that this deployment's starts make now, if any: the longest that is due."""
    pauses = (_after_failed_starts(turn, state), _after_deaths(turn, state))
    running = [pause for pause in pauses if pause is not None and turn.now_s <= pause.until_s]
    return max(running, key=lambda pause: pause.until_s, default=None)


def recent_deaths(turn: Turn, state: DeploymentState) -> int:
    """How many of its replicas died of late."""
    deaths = _blamed(turn.view, state.deaths, turn.config.max_deaths)
    return sum(turn.now_s - death.at_s < turn.config.death_window_s for death in deaths)


def _after_failed_starts(turn: Turn, state: DeploymentState) -> Pause | None:
    # The first costs nothing. If a node is lost, or its Triton, that is known before the third try,
    # which goes around it.
    config, failed = turn.config, state.failed_starts
    if not failed or (_is_permanent(failed[-1]) and turn.view.waiting(state.name) > 0):
        return None
    # So long a time without a try is a new beginning.
    forgotten_s = 2 * config.most_pause_s
    times = [each.at_s for each in failed]
    level = _level(times, free=1, within_s=forgotten_s, reset_s=forgotten_s)
    length_s = _pause_s(config.node_timeout_s, level, config.most_pause_s)
    is_hopeless = len(_blamed(turn.view, failed, config.max_failed_starts)) >= (
        config.max_failed_starts
    )
    failure = failed[-1].failure if is_hopeless else None
    return Pause(until_s=times[-1] + length_s, failure=failure) if length_s else None


def _after_deaths(turn: Turn, state: DeploymentState) -> Pause | None:
    config = turn.config
    deaths = _blamed(turn.view, state.deaths, config.max_deaths)
    level = _level(
        [death.at_s for death in deaths],
        free=config.max_deaths - 1,
        within_s=config.death_window_s,
        reset_s=config.death_window_s,
    )
    length_s = _pause_s(config.death_pause_s, level, config.most_pause_s)
    if not length_s:
        return None
    newest = deaths[-1]
    count = sum(newest.at_s - death.at_s < config.death_window_s for death in deaths)
    message = (
        f"{count} of its replicas died within {config.death_window_s / 60:g} minutes, so that its "
        f"next start waits {length_s:.0f} s; the last one: {newest.failure.message}"
    )
    failure = replace(newest.failure, message=message)
    return Pause(until_s=newest.at_s + length_s, failure=failure)


def _level(times: Sequence[float], *, free: int, within_s: float, reset_s: float) -> int:
    """How often it has happened too often: beyond `free` times within a while, without a rest."""
    level = 0
    for number, time_s in enumerate(times):
        if number and time_s - times[number - 1] >= reset_s:
            level = 0
        recent = sum(time_s - earlier_s < within_s for earlier_s in times[: number + 1])
        if level or recent > free:
            level += 1
    return level


def _pause_s(first_s: float, level: int, most_s: float) -> float:
    return min(most_s, first_s * 2.0 ** (level - 1)) if level else 0.0


def _is_permanent(setback: Setback) -> bool:
    return setback.failure.grpc_code in _PERMANENT


def _recent_failures(turn: Turn, state: DeploymentState) -> tuple[Setback, ...]:
    now_s, window_s = turn.now_s, turn.config.failure_window_s
    recent = tuple(failed for failed in state.failed_starts if now_s - failed.at_s < window_s)
    return _blamed(turn.view, recent, turn.config.max_failed_starts)


def _blamed(
    view: ClusterView, setbacks: Sequence[Setback], most_forgiven: int
) -> tuple[Setback, ...]:
    """What is the deployment's own; a model that brings every node down is to blame in the end."""
    faults = [number for number, each in enumerate(setbacks) if _is_nodes_fault(view, each)]
    forgiven = frozenset(faults[:most_forgiven])
    return tuple(each for number, each in enumerate(setbacks) if number not in forgiven)


def _is_nodes_fault(view: ClusterView, setback: Setback) -> bool:
    return setback.failure.is_nodes_fault or any(
        node.triton_lost_s is not None
        and -_BEFORE_LOSS_S <= setback.at_s - node.triton_lost_s <= _AFTER_LOSS_S
        for name in setback.nodes
        if (node := view.nodes.get(name)) is not None
    )
