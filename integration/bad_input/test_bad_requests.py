"""Requests that cannot be answered: one sentence over both protocols, and no model woken."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from integration.bad_input.bad_requests import (
    BODIES,
    REPLICA_REQUESTS,
    REQUESTS,
    BadBody,
    BadRequest,
)
from integration.support.both_protocols import (
    Request,
    ask_grpc,
    ask_http,
    both_told,
    refused,
)
from integration.support.refusals import each, settled, snapshot
from integration.support.tiny_cluster import Stream, TinyCluster

MODEL = "qwen2-tied"
GOOD = {"input_ids": ("INT32", [5, 6, 7])}


def answers(cluster: TinyCluster, name: str) -> None:
    """A deployment gives both clients the oracle's tokens."""
    request = Request(model=name, inputs=GOOD, parameters={"max_tokens": 8})
    expected = cluster.models[MODEL].greedy([5, 6, 7], 8)
    assert ask_grpc(cluster, request) == ask_http(cluster, request) == expected


@pytest.fixture(scope="module")
def deployed(cluster: TinyCluster) -> Iterator[TinyCluster]:
    """`asleep` is at zero and answers when all bad requests are through; `awake` has a replica."""
    cluster.deploy("asleep", MODEL, 2)
    cluster.deploy("awake", MODEL, 1)
    answers(cluster, "awake")
    yield cluster
    for name in ("asleep", "awake"):
        answers(cluster, name)
        cluster.client.delete(name)


@pytest.fixture(autouse=True)
def _nothing_changes(deployed: TinyCluster) -> Iterator[None]:
    before = snapshot(deployed)
    yield
    assert settled(lambda: snapshot(deployed), before) == before


def request_of(case: BadRequest, name: str) -> Request:
    return Request(
        model=case.model or name,
        version=case.version,
        inputs=case.inputs,
        parameters=case.parameters,
        outputs=case.outputs,
    )


@each(REQUESTS)
def test_a_bad_request_wakes_no_model(deployed: TinyCluster, case: BadRequest) -> None:
    assert refused(deployed, request_of(case, "asleep")) == both_told(case.error, case.says)


@each(REPLICA_REQUESTS)
def test_what_only_a_replica_can_tell(deployed: TinyCluster, case: BadRequest) -> None:
    assert refused(deployed, request_of(case, "awake")) == both_told(case.error, case.says)


def test_a_stream_tells_what_is_wrong(deployed: TinyCluster) -> None:
    stream = Stream(deployed, "awake", [5], max_tokens=0)
    with pytest.raises(Exception, match=r"'max_tokens' is 0; it must be at least 1\.$"):
        stream.next()
    stream.close()


def generate_call(cluster: TinyCluster, body: bytes) -> tuple[int, str]:
    """Post to `generate` as curl does; return the status and the error."""
    layout = cluster.layout
    url = f"http://{layout.host}:{layout.gateway_http_port}/v2/models/asleep/generate"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(url, body)
    with caught.value as answer:
        return answer.status or 0, json.load(answer)["error"]


@each(BODIES)
def test_a_bad_body_of_generate(deployed: TinyCluster, case: BadBody) -> None:
    assert generate_call(deployed, case.body) == (case.error.http_status, case.says)
