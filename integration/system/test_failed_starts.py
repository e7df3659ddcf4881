"""Deployments that were good and cannot start: the reason reaches every client, nothing is left."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tritonclient.utils import InferenceServerException

from integration.support.both_protocols import (
    Refused,
    Request,
    ask_grpc,
    both_told,
    refused,
)
from integration.support.bucket import s3_client, upload
from integration.support.refusals import deployments, remains, settled
from integration.support.strict_store import StrictStore
from integration.support.tiny_cluster import TinyCluster, stubs, wait_until
from paraserve_backend.errors import AccessDenied, InvalidCheckpoint
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.cli.views.tables import pause_lines
from paraserve_scheduler.local.layout import BUCKET
from tests.support.stores import serve

MODEL = "qwen2-tied"
SHARD = "model.safetensors"
CHANGED = f"{SHARD} has changed since it was deployed: delete the deployment and deploy it again"


@pytest.fixture
def folder(cluster: TinyCluster, tmp_path: Path) -> Path:
    """A good checkpoint that the test may spoil once it is deployed."""
    stored = cluster.layout.files.buckets / BUCKET / MODEL
    return Path(shutil.copytree(stored, tmp_path / "model"))


@contextmanager
def deployed(cluster: TinyCluster, name: str, **spec: Any) -> Iterator[Failing]:
    """Deploy, and delete in the end; nothing of it is left then, and all else as it was."""
    before = deployments(cluster)
    cluster.client.deploy(pb.DeploymentSpec(name=name, **spec))
    cluster.until_known(name)
    try:
        yield Failing(cluster, name)
    finally:
        cluster.client.delete(name)
    # A node that did not let go in time is told again.
    assert_nothing_remains(cluster, name)
    assert deployments(cluster) == before


def assert_nothing_remains(cluster: TinyCluster, name: str) -> None:
    nothing: list[str] = []
    assert settled(lambda: remains(cluster, name), nothing) == nothing


class Failing:
    """A deployment at zero whose start fails, and leaves nothing on any node."""

    def __init__(self, cluster: TinyCluster, name: str) -> None:
        self._cluster = cluster
        self.request = Request(model=name, inputs={"input_ids": ("INT32", [1, 2])})

    def refused(self) -> Refused:
        told = refused(self._cluster, self.request)
        assert_nothing_remains(self._cluster, self.request.model)
        return told


def failed(name: str, reason: str) -> str:
    return f"The cold start of '{name}' failed: {reason}"


@pytest.mark.parametrize("stages", [1, 3])
def test_weights_that_vanish(cluster: TinyCluster, folder: Path, stages: int) -> None:
    source = upload(cluster.layout, folder, "vanishing", Console(quiet=True))
    with deployed(cluster, "vanished", source=source, max_stages=stages) as start:
        # All of them: one stage may miss another file first, and would name that.
        for path in folder.iterdir():
            s3_client(cluster.layout).delete_object(Bucket=BUCKET, Key=f"vanishing/{path.name}")
        told = start.refused()
    assert (told.grpc_code, told.http_status) == ("NOT_FOUND", 404)
    assert told.grpc_sentence.startswith(failed("vanished", ""))
    assert told.grpc_sentence.endswith(" is no longer in the store (HTTP 404 NoSuchKey)")


def test_weights_that_change_are_never_mixed(cluster: TinyCluster, folder: Path) -> None:
    with deployed(cluster, "changed", source=str(folder), max_stages=2) as start:
        with (folder / SHARD).open("ab") as file:
            file.write(bytes(16))
        told = start.refused()
    assert told == both_told(InvalidCheckpoint, failed("changed", CHANGED))


@pytest.mark.parametrize("content", [b"{}", b"nonsense"])
def test_a_tokenizer_that_is_none(cluster: TinyCluster, folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with deployed(cluster, "mute", source=str(folder), max_stages=1) as start:
        told = start.refused()
    assert (told.grpc_code, told.http_status) == ("INVALID_ARGUMENT", 400)
    # What is wrong with it, the tokenizers library says.
    assert told.grpc_sentence.startswith(failed("mute", "tokenizer.json cannot be read: "))


def test_credentials_that_expire_between_two_stages_and_work_again(
    cluster: TinyCluster, folder: Path
) -> None:
    store = StrictStore(folder)
    spec = {"source": f"s3://{BUCKET}/model", "max_stages": 2}
    reason = (
        f"the store refuses access to {SHARD} (HTTP 400 ExpiredToken): the credentials have "
        "expired, renew them where the scheduler and the agents run"
    )
    with serve(store) as url, deployed(cluster, "expired", endpoint_url=url, **spec) as start:
        store.reads_left = 1
        assert start.refused() == both_told(AccessDenied, failed("expired", reason))
        store.reads_left = None
        expected = cluster.models[MODEL].greedy([1, 2], 16)
        assert answer_after_a_while(cluster, start.request) == expected


def answer_after_a_while(cluster: TinyCluster, request: Request) -> list[int]:
    """Ask until a start is tried again: for a while a failure is told without trying."""
    answers: list[list[int]] = []

    def is_answered() -> bool:
        with contextlib.suppress(InferenceServerException):
            answers.append(ask_grpc(cluster, request))
        return bool(answers)

    wait_until(is_answered)
    return answers[0]


def test_replicas_that_die_again_and_again_are_started_less_and_less_often(
    cluster: TinyCluster, folder: Path
) -> None:
    with deployed(cluster, "mortal", source=str(folder), max_stages=1) as start:
        expected = cluster.models[MODEL].greedy([1, 2], 16)
        # A death that a Triton's crash followed is not counted.
        while (state := status(cluster, "mortal")).recent_deaths < 5:
            assert ask_grpc(cluster, start.request) == expected
            kill(cluster, "mortal")
        assert state.starts_paused_until_s > state.replicas[-1].ready_s
        (line,) = pause_lines(cluster.client.status("mortal"))
        assert "starts paused until" in line
        assert "5 replicas died in the last five minutes: The process of model mortal." in line
        told = start.refused()
        assert (told.grpc_code, told.http_status) == ("UNAVAILABLE", 503)
        assert "5 of its replicas died within 5 minutes" in told.grpc_sentence
        assert answer_after_a_while(cluster, start.request) == expected


def status(cluster: TinyCluster, name: str) -> pb.DeploymentStatus:
    (found,) = cluster.client.status(name).deployments
    return found


def ready(cluster: TinyCluster, name: str) -> list[str]:
    """Return the replicas that are ready."""
    found = status(cluster, name).replicas
    return [replica.replica for replica in found if replica.phase == pb.READY]


def kill(cluster: TinyCluster, name: str) -> None:
    """Kill the processes of the replicas that are ready; returns when that is known."""
    found = ready(cluster, name)
    for replica in found:
        for pid in stubs(replica):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: ready(cluster, name) != found)
