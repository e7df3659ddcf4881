"""Unmodified clients on a real cluster: each is right from zero on, and warm.

The oracle is transformers' `generate` on the same checkpoint. KServe's client and AIPerf live in
environments of their own; `make clients` makes those and runs everything.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from integration.clients import commands, environments, triton
from integration.clients.question import (
    Answer,
    Ask,
    Gateway,
    Look,
    Question,
    Sight,
)
from integration.support.tiny_cluster import TinyCluster

MODEL = "llama-sharded"
PROMPT = [5, 6, 7]
MAX_TOKENS = 12


def needs(client: str) -> pytest.MarkDecorator:
    if client == "curl":
        is_there, reason = shutil.which("curl") is not None, "curl is not installed"
    else:
        is_there, reason = environments.is_there(client), f"`make clients` installs {client}"
    return pytest.mark.skipif(not is_there, reason=reason)


def params(ways: Mapping[str, Ask] | Mapping[str, Look], client: str) -> list[Any]:
    return [pytest.param(way, id=name, marks=needs(client)) for name, way in ways.items()]


LOOKS = [
    *(pytest.param(look, id=name) for name, look in triton.LOOKS.items()),
    *params(commands.CURL_LOOKS, "curl"),
    *params(commands.KSERVE_LOOKS, "kserve"),
]
ONE_REQUEST_WAYS = [
    *(pytest.param(ask, id=name) for name, ask in triton.WAYS.items()),
    *params(commands.CURL_WAYS, "curl"),
    *params(commands.KSERVE_WAYS, "kserve"),
]
WAYS = [*ONE_REQUEST_WAYS, *params(commands.AIPERF_WAYS, "aiperf")]


@pytest.fixture
def gateway(cluster: TinyCluster) -> Gateway:
    layout = cluster.layout
    return Gateway(
        grpc_address=layout.gateway_address,
        http_address=f"{layout.host}:{layout.gateway_http_port}",
    )


@contextmanager
def deployed(cluster: TinyCluster) -> Iterator[str]:
    """A deployment at zero; of one stage, since a client cannot tell how many there are."""
    cluster.deploy("asked", MODEL, stages=1)
    try:
        yield "asked"
    finally:
        cluster.client.delete("asked")


def num_replicas(cluster: TinyCluster, name: str) -> int:
    return len(cluster.client.status(name).deployments[0].replicas)


def question(name: str, max_tokens: int = MAX_TOKENS) -> Question:
    words = " ".join(f"w{token}" for token in PROMPT)
    return Question(deployment=name, prompt=words, max_tokens=max_tokens)


@pytest.mark.parametrize("ask", WAYS)
def test_a_client_gets_transformers_tokens_cold_and_warm(
    cluster: TinyCluster, gateway: Gateway, ask: Ask
) -> None:
    ids = cluster.models[MODEL].greedy(PROMPT, MAX_TOKENS)
    expected = Answer(token_ids=ids, text="".join(f" w{token}" for token in ids))
    with deployed(cluster) as name:
        assert num_replicas(cluster, name) == 0
        cold = ask(gateway, question(name))
        warm = ask(gateway, question(name))
        assert [cold, warm] == [expected, expected]
        assert num_replicas(cluster, name) == 1


@pytest.mark.parametrize("ask", ONE_REQUEST_WAYS)
def test_a_client_is_told_what_is_wrong_with_its_request(
    cluster: TinyCluster, gateway: Gateway, ask: Ask
) -> None:
    with deployed(cluster) as name:
        with pytest.raises(Exception, match="'max_tokens' is 0; it must be at least 1"):
            ask(gateway, question(name, max_tokens=0))
        with pytest.raises(Exception, match="unknown model: 'nobody' is not found"):
            ask(gateway, question("nobody"))
        assert num_replicas(cluster, name) == 0


@pytest.mark.parametrize("look", LOOKS)
def test_a_client_finds_a_deployment_at_zero_ready_and_does_not_wake_it(
    cluster: TinyCluster, gateway: Gateway, look: Look
) -> None:
    with deployed(cluster) as name:
        assert look(gateway, name) == Sight(
            is_server_live=True,
            is_server_ready=True,
            is_deployment_ready=True,
            is_unknown_ready=False,
        )
        assert num_replicas(cluster, name) == 0


@needs("curl")
def test_curl_finds_the_tensors_of_a_deployment_at_zero(
    cluster: TinyCluster, gateway: Gateway
) -> None:
    with deployed(cluster) as name:
        metadata = commands.curl_metadata(gateway, name)
        assert metadata["name"] == name
        assert {"name": "text_input", "datatype": "BYTES", "shape": [1]} in metadata["inputs"]
        assert num_replicas(cluster, name) == 0
