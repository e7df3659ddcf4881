"""Replaces single records of a view, for `state.fold` and `state.begin`; skips unknown names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from paraserve_scheduler.state.records import (
    DeploymentState,
    HandOverState,
    NodeState,
    Replica,
)
from paraserve_scheduler.state.view import ClusterView

_Value = TypeVar("_Value")


def with_item(values: Mapping[str, _Value], key: str, value: _Value) -> dict[str, _Value]:
    return {**values, key: value}


def without_item(values: Mapping[str, _Value], key: str) -> dict[str, _Value]:
    return {other: value for other, value in values.items() if other != key}


def change_deployment(
    view: ClusterView, name: str, change: Callable[[DeploymentState], DeploymentState]
) -> ClusterView:
    state = view.deployments.get(name)
    if state is None:
        return view
    return replace(view, deployments=with_item(view.deployments, name, change(state)))


def change_node(
    view: ClusterView, name: str, change: Callable[[NodeState], NodeState]
) -> ClusterView:
    node = view.nodes.get(name)
    if node is None:
        return view
    return replace(view, nodes=with_item(view.nodes, name, change(node)))


def change_replica(
    view: ClusterView, name: str, change: Callable[[Replica], Replica]
) -> ClusterView:
    replica = view.replicas.get(name)
    if replica is None:
        return view
    return replace(view, replicas=with_item(view.replicas, name, change(replica)))


def change_hand_over(
    view: ClusterView, name: str, change: Callable[[HandOverState], HandOverState]
) -> ClusterView:
    return change_replica(
        view, name, lambda replica: replace(replica, hand_over=change(replica.hand_over))
    )
