"""Deployments that cannot be: the exact answer of a real cluster, and nothing of it changed."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from integration.bad_input.bad_checkpoints import CHECKPOINTS, BadCheckpoint, write_huge_model
from integration.bad_input.bad_sources import (
    SOURCES,
    SPECS,
    STORES,
    BadSpec,
    BadStore,
)
from integration.support.bucket import upload
from integration.support.refusals import each, settled, snapshot
from integration.support.strict_store import StrictStore
from integration.support.tiny_cluster import TinyCluster, generate
from paraserve_backend.errors import ParaServeError
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.local.layout import BUCKET
from tests.support.stores import serve

MODEL = "qwen2-tied"


@pytest.fixture(scope="module")
def good(cluster: TinyCluster) -> Iterator[pb.DeploymentSpec]:
    """A deployment at zero that still answers, rightly, when all the bad ones are through."""
    spec = pb.DeploymentSpec(name="good", source=cluster.sources[MODEL], max_stages=1)
    cluster.client.deploy(spec)
    yield spec
    expected = cluster.models[MODEL].greedy([5, 6, 7], 8)
    assert generate(cluster, "good", [5, 6, 7], 8) == expected
    cluster.client.delete("good")


@pytest.fixture(autouse=True)
def _nothing_changes(cluster: TinyCluster, good: pb.DeploymentSpec) -> Iterator[None]:
    before = snapshot(cluster)
    yield
    assert settled(lambda: snapshot(cluster), before) == before


@pytest.fixture
def folder(cluster: TinyCluster, tmp_path: Path) -> Path:
    """A good checkpoint that the test may spoil."""
    stored = cluster.layout.files.buckets / BUCKET / MODEL
    return Path(shutil.copytree(stored, tmp_path / "model"))


def refusal(cluster: TinyCluster, spec: pb.DeploymentSpec) -> tuple[str, str]:
    """The code and the sentence with which the scheduler refuses a deployment."""
    with pytest.raises(ParaServeError) as caught:
        cluster.client.deploy(spec)
    return caught.value.grpc_code, str(caught.value)


@each(CHECKPOINTS)
def test_a_bad_checkpoint(cluster: TinyCluster, folder: Path, case: BadCheckpoint) -> None:
    names = case.spoil(folder) or {}
    prefix = f"spoilt/{folder.parent.name}"
    source = upload(cluster.layout, folder, prefix, Console(quiet=True))
    answer = refusal(cluster, pb.DeploymentSpec(name="bad", source=source))
    assert answer == case.expected(source=source, **names)


@each(SPECS)
def test_a_bad_setting(cluster: TinyCluster, good: pb.DeploymentSpec, case: BadSpec) -> None:
    spec = pb.DeploymentSpec(name="bad", source=good.source)
    spec.MergeFrom(pb.DeploymentSpec(**case.fields))
    assert refusal(cluster, spec) == case.expected(source=good.source)


@each(SOURCES)
def test_a_bad_source(cluster: TinyCluster, case: BadSpec) -> None:
    spec = pb.DeploymentSpec(name="bad", **case.fields)
    assert refusal(cluster, spec) == case.expected()


@each(STORES)
def test_a_store_that_refuses(cluster: TinyCluster, folder: Path, case: BadStore) -> None:
    store = StrictStore(folder, region=case.region)
    store.answer = case.answer
    source = f"s3://{BUCKET}/model"
    with serve(store) as url:
        spec = pb.DeploymentSpec(name="bad", source=source, endpoint_url=url)
        answer = refusal(cluster, spec)
    assert answer == case.expected(source=source, endpoint=url)


def test_an_endpoint_where_nothing_answers(cluster: TinyCluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    source = f"s3://{BUCKET}/{MODEL}"
    assert refusal(cluster, pb.DeploymentSpec(name="bad", source=source, endpoint_url=url)) == (
        "UNAVAILABLE",
        f"nothing answers at {url}, where {source} should be: check the endpoint",
    )


def test_a_model_that_no_set_of_nodes_can_hold(cluster: TinyCluster, folder: Path) -> None:
    write_huge_model(folder)
    code, sentence = refusal(cluster, pb.DeploymentSpec(name="bad", source=str(folder)))
    size = r"\d+\.\d GB"  # what is free depends on the machine
    assert code == "UNAVAILABLE"
    assert re.fullmatch(
        "'bad' needs 60.3 GB in 4 equal stages, but the 4 live nodes with most room have "
        rf"{size} free: {size} are missing\.",
        sentence,
    )


def test_the_region_that_the_store_names_is_the_right_one(
    cluster: TinyCluster, folder: Path
) -> None:
    with serve(StrictStore(folder, region="eu-west-1")) as url:
        spec = pb.DeploymentSpec(
            name="far", source=f"s3://{BUCKET}/model", endpoint_url=url, region="eu-west-1"
        )
        cluster.client.deploy(spec)
        cluster.until_known("far")
        expected = cluster.models[MODEL].greedy([3, 4], 4)
        assert generate(cluster, "far", [3, 4], 4) == expected
        cluster.client.delete("far")


def test_deploying_the_same_again_changes_nothing(
    cluster: TinyCluster, good: pb.DeploymentSpec
) -> None:
    assert cluster.client.deploy(good).spec == cluster.client.status("good").deployments[0].spec


def test_an_unknown_deployment_cannot_be_deleted(cluster: TinyCluster) -> None:
    with pytest.raises(ParaServeError) as caught:
        cluster.client.delete("nothing")
    assert (caught.value.grpc_code, str(caught.value)) == (
        "NOT_FOUND",
        "There is no deployment 'nothing'. Deployments: good.",
    )


# ---- the command line ----


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    status: int
    said: str


def deploy_command(cluster: TinyCluster, *words: str) -> Ended:
    layout = cluster.layout
    command = [sys.executable, "-m", "paraserve_scheduler.cli", "deploy", *words]
    flags = ["--scheduler", layout.scheduler_address, "--token-file", str(layout.files.token)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    return Ended(status=done.returncode, said=done.stderr)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
@pytest.mark.parametrize("flag", ["--ttft-slo"])
def test_a_time_that_is_none_is_wrong_usage(cluster: TinyCluster, flag: str, seconds: str) -> None:
    ended = deploy_command(cluster, "bad", "--source", "s3://m/x", flag, seconds)
    assert ended.status == 2
    assert ended.said.splitlines()[-1] == (
        f"paraserve deploy: error: argument {flag}: '{seconds}' is no number of seconds above 0"
    )


@each([case for case in SPECS if case.words])
def test_the_command_says_what_the_scheduler_says_and_exits_with_1(
    cluster: TinyCluster, good: pb.DeploymentSpec, case: BadSpec
) -> None:
    ended = deploy_command(cluster, *case.words, "--source", good.source)
    _, sentence = case.expected(source=good.source)
    assert ended == Ended(status=1, said=f"paraserve: {sentence}\n")


def test_the_same_command_again_succeeds(cluster: TinyCluster, good: pb.DeploymentSpec) -> None:
    words = ("good", "--source", good.source, "--max-stages", "1")
    assert deploy_command(cluster, *words) == Ended(status=0, said="")
