"""What demo, benchmarks and tests do with a running cluster: ask, and wait for zero."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import tritonclient.grpc as triton

from integration.support.limits import HANG_S
from paraserve_backend.errors import DeadlineExceeded, Unavailable
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.cli.views import timeline
from paraserve_scheduler.client.generate import stream
from paraserve_scheduler.client.scheduler import SchedulerClient
from paraserve_scheduler.local.layout import ClusterLayout

_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    text: str
    token_ids: tuple[int, ...]
    #: From the request to the first piece, as the client saw it.
    ttft_s: float


def ask(
    layout: ClusterLayout,
    deployment: str,
    prompt: str,
    max_tokens: int,
    on_text: Callable[[str], object] = lambda _text: None,
) -> Answer:
    """Send one greedy request through the gateway with Triton's own client; wait for its end."""
    settings = {"max_tokens": max_tokens, "ignore_eos": True}
    text, token_ids, first_s = "", list[int](), None
    started_s = time.monotonic()
    for piece in stream(layout.gateway_address, deployment, prompt, settings, timeout_s=HANG_S):
        first_s = first_s or time.monotonic()
        token_ids.extend(piece.token_ids)
        text += piece.text
        on_text(piece.text)
    if first_s is None:
        raise Unavailable(f"The answer of {deployment} was empty.")
    return Answer(text=text, token_ids=tuple(token_ids), ttft_s=first_s - started_s)


def cold_start(client: SchedulerClient, deployment: str) -> pb.ReplicaStatus:
    """Return the newest cold start when the gateway has reported its first token."""
    deadline = time.monotonic() + HANG_S
    while True:
        replica = timeline.newest(client.status(deployment))
        if replica is not None and replica.first_token_s:
            return replica
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"The scheduler was not told of {deployment}'s first token.")
        time.sleep(_POLL_S)


def wait_for_zero(
    layout: ClusterLayout, client: SchedulerClient, deployment: str, *, timeout_s: float
) -> None:
    """Wait until neither the scheduler nor any Triton server has the deployment.

    Raises:
        DeadlineExceeded: something is left after `timeout_s`; says what.
    """
    deadline = time.monotonic() + timeout_s
    while (left := _left(layout, client, deployment)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if left:
        raise DeadlineExceeded(f"{deployment} did not go to zero: {left}.")


def _left(layout: ClusterLayout, client: SchedulerClient, deployment: str) -> str:
    status = client.status(deployment)
    for entry in status.deployments:
        for replica in entry.replicas:
            if not replica.removed_s:
                return f"replica {replica.replica} is still there"
    for node in layout.nodes:
        for model in ready_models(f"{node.host}:{node.triton_grpc_port}"):
            if model.startswith(f"{deployment}."):
                return f"{node.name} still holds {model}"
    return ""


def ready_models(triton_address: str) -> tuple[str, ...]:
    """Ask a Triton server itself what it holds."""
    server = triton.InferenceServerClient(triton_address)
    try:
        models = server.get_model_repository_index().models
    finally:
        server.close()
    return tuple(model.name for model in models if model.state == "READY")
