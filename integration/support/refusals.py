"""Bad input as tables: what is done wrong, the exact answer, and the cluster as it was before.

`integration.bad_input.errors_page` makes docs/errors.md of the same tables.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import tritonclient.grpc as triton

from integration.support.limits import HANG_S
from integration.support.tiny_cluster import TinyCluster
from paraserve_backend.errors import ParaServeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One mistake and what the user is told; `says` may name `{source}` and the like."""

    what: str
    says: str
    error: type[ParaServeError]

    def expected(self, **names: object) -> tuple[str, str]:
        """The gRPC code and the sentence."""
        return self.error.grpc_code, self.says.format(**names)


_Case = TypeVar("_Case", bound=Refusal)
_Value = TypeVar("_Value")


def each(cases: Sequence[_Case]) -> pytest.MarkDecorator:
    """Run a test for every row of a table, as its argument `case`."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.what)


def settled(read: Callable[[], _Value], wanted: _Value) -> _Value:
    """Return what `read` gives once that is `wanted`, or what it is in the end.

    Heartbeats tell of a node's memory once a second.
    """
    deadline_s = time.monotonic() + HANG_S
    while (value := read()) != wanted and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return value


def snapshot(cluster: TinyCluster) -> Mapping[str, Any]:
    """What is deployed, and what every node holds: memory, models, files."""
    memory = {
        node.info.name: (node.alive, node.reserved_bytes, node.tier_used_bytes)
        for node in cluster.client.status().nodes
    }
    return {"deployments": deployments(cluster), "memory": memory, "nodes": contents(cluster)}


def deployments(cluster: TinyCluster) -> Mapping[str, Any]:
    """By name, what was asked for and which replicas there are."""
    return {
        deployment.spec.name: (
            deployment.spec.SerializeToString(deterministic=True),
            [(replica.replica, replica.phase) for replica in deployment.replicas],
        )
        for deployment in cluster.client.status().deployments
    }


def remains(cluster: TinyCluster, deployment: str) -> list[str]:
    """What any node still holds of a deployment: models and files."""
    held = (group for node in contents(cluster).values() for group in node)
    return [name for group in held for name in group if f"{deployment}." in name]


def contents(cluster: TinyCluster) -> Mapping[str, tuple[list[str], list[str], list[str]]]:
    """By node: models that are ready, files of its model repository, files of its tier."""
    files = cluster.layout.files
    found = {}
    for node in cluster.layout.nodes:
        client = triton.InferenceServerClient(f"{node.host}:{node.triton_grpc_port}")
        models = client.get_model_repository_index().models
        client.close()
        found[node.name] = (
            sorted(model.name for model in models if model.state == "READY"),
            _files(files.model_repository(node.name)),
            _files(files.run_dir(node.name)),
        )
    return found


def _files(root: Path) -> list[str]:
    # Not rglob(): it trips over folders that go while it looks.
    return sorted(f"{folder}/{name}" for folder, _, names in os.walk(root) for name in names)
