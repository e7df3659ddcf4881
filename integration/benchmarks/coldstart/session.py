"""One testbed of bench_coldstart while it is up: starts variants on it, one after the other.

    python -m integration.benchmarks.coldstart.session CLUSTER_JSON VARIANT ...

A process of its own in the hub's network. The first line that it writes has the measured rates of
the links, each other one a start.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc

from integration.benchmarks.coldstart.summary import Start
from integration.benchmarks.coldstart.variants import (
    SHAPES,
    VARIANTS,
    Deployed,
    Plain,
    Testbed,
    Variant,
    Weights,
)
from integration.support.bucket import s3_client
from integration.support.checkpoints import llama_bytes
from integration.support.limits import HANG_S
from integration.support.memory import backed_memory, model_processes_peak_bytes
from integration.support.namespaces import inside
from integration.support.plain_triton import WARM_REQUESTS, PlainTriton
from integration.support.rest import wait_for_rest
from integration.support.scenario import ask, cold_start, wait_for_zero
from paraserve_backend.errors import DeadlineExceeded, ParaServeError, Unavailable
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.auth import metadata
from paraserve_backend.rpc.paraserve_pb2_grpc import AgentStub
from paraserve_scheduler.client.scheduler import SchedulerClient
from paraserve_scheduler.local.layout import (
    BUCKET,
    ClusterLayout,
    NodeLayout,
    read_running,
)

PROMPT = "The time to first token of a model at zero"
MAX_TOKENS = 4
_KEEP_ALIVE_S = 2.0
#: Weights are copied to disk while they are in use: 5 s after a start, 200 MB/s.
_DISK_KEEP_ALIVE_S = 25.0
#: Slots are made anew after a start; a machine that is busy with something else stays so.
_REST_TIMEOUT_S = 10.0
_POLL_S = 0.1
#: How long a link is measured.
_LINK_S = 1.5


def main() -> None:
    """Run in the hub's network: gRPC's threads stay for good in that of their first use."""
    layout = read_running(Path(sys.argv[1])).layout
    variants = [variant for variant in VARIANTS if variant.name in sys.argv[2:]]
    with ExitStack() as stack:
        token = layout.files.token.read_text()
        client = stack.enter_context(SchedulerClient(layout.scheduler_address, token))
        plain = None
        if any(isinstance(variant.how, Plain) for variant in variants):
            plain = stack.enter_context(PlainTriton(layout, layout.nodes[0]))
        session = Session(layout, client, plain, variants[0].testbed)
        _say(session.link_bytes_per_s())
        for variant in variants:
            _say(session.start(variant).to_json())


def _say(line: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


class Session:
    def __init__(
        self,
        layout: ClusterLayout,
        client: SchedulerClient,
        plain: PlainTriton | None,
        testbed: Testbed,
    ) -> None:
        self._layout = layout
        self._client = client
        self._plain = plain
        self._testbed = testbed
        #: Nodes that have read a source, of those started here.
        self._readers: dict[str, list[str]] = {}

    def start(self, variant: Variant) -> Start:
        """Start one variant from zero; nothing of it runs before or after."""
        if isinstance(variant.how, Plain):
            return self._start_plain(variant, variant.how)
        if variant.how.weights is not Weights.STORE and variant.source not in self._readers:
            self._fill(variant, variant.how)
        with self._elsewhere(variant, variant.how):
            return self._start_deployed(variant, variant.how, variant.name)

    def link_bytes_per_s(self) -> dict[str, float]:
        """Measure what one GET brings to a node, by the nominal Gbit/s of its network."""
        nodes = dict(zip(self._testbed.gbit, self._layout.nodes, strict=True))
        return {str(gbit): self._measure(gbit, node) for gbit, node in nodes.items()}

    def _start_plain(self, variant: Variant, how: Plain) -> Start:
        assert self._plain is not None
        source = f"s3://{BUCKET}/{variant.source}"
        wait_for_rest(_REST_TIMEOUT_S)
        with backed_memory(_written_bytes(variant)):
            start = self._plain.start(how.loader, source, PROMPT, MAX_TOKENS)
        return Start(
            variant=variant.name,
            ttft_s=start.ttft_s,
            warm_ttft_s=start.warm_ttft_s,
            token_ids=start.token_ids,
            peak_bytes=start.peak_bytes,
        )

    def _fill(self, variant: Variant, how: Deployed) -> None:
        """Have the weights read once, and wait until they are where the start shall find them."""
        keep_alive_s = _DISK_KEEP_ALIVE_S if how.weights is Weights.DISK else _KEEP_ALIVE_S
        self._start_deployed(variant, how, f"{variant.name}-fill", keep_alive_s)
        if how.weights is Weights.DISK:
            used_bytes = sum(self._status(node).disk_used_bytes for node in self._layout.nodes)
            if used_bytes < llama_bytes(SHAPES[variant.checkpoint]):
                raise DeadlineExceeded(f"Only {used_bytes} bytes of {variant.name} are on disk.")

    def _start_deployed(
        self, variant: Variant, how: Deployed, name: str, keep_alive_s: float = _KEEP_ALIVE_S
    ) -> Start:
        self._deploy(name, variant.source, how, keep_alive_s)
        self._wait_for_slots()
        wait_for_rest(_REST_TIMEOUT_S)
        with backed_memory(_written_bytes(variant)):
            first = ask(self._layout, name, PROMPT, MAX_TOKENS)
        again = [ask(self._layout, name, PROMPT, MAX_TOKENS) for _ in range(WARM_REQUESTS)]
        replica = self._first_replica(name)
        if len(replica.parts) != how.stages and len(set(self._testbed.gbit)) == 1:
            raise ParaServeError(f"{name} has {len(replica.parts)} stages: {replica.reason}.")
        peak_bytes = model_processes_peak_bytes(self._layout.nodes)
        self._readers[variant.source] = [part.node for part in replica.parts]
        wait_for_zero(self._layout, self._client, name, timeout_s=keep_alive_s + HANG_S)
        self._client.delete(name)
        return Start(
            variant=variant.name,
            ttft_s=first.ttft_s,
            warm_ttft_s=min(answer.ttft_s for answer in again),
            token_ids=first.token_ids,
            peak_bytes=peak_bytes,
            replica=replica,
        )

    def _first_replica(self, name: str) -> pb.ReplicaStatus:
        """Return the start that was measured, once the gateway has reported its first token."""
        newest = cold_start(self._client, name)
        (deployment,) = self._client.status(name).deployments
        return next((it for it in deployment.replicas if it.replica == f"{name}.1"), newest)

    def _deploy(self, name: str, source: str, how: Deployed, keep_alive_s: float) -> None:
        self._client.deploy(
            pb.DeploymentSpec(
                name=name,
                source=f"s3://{BUCKET}/{source}",
                max_stages=how.stages,
                ttft_slo_s=how.ttft_slo_s,
                max_context=512,
                keep_alive_s=keep_alive_s,
                consolidate=False,
            )
        )

    @contextmanager
    def _elsewhere(self, variant: Variant, how: Deployed) -> Iterator[None]:
        """Keep a start that shall read from peers off the nodes that have the weights."""
        holders = self._readers[variant.source] if how.weights is Weights.PEER else []
        for node in holders:
            self._client.drain(node)
        try:
            yield
        finally:
            for node in holders:
                self._client.drain(node, undo=True)

    def _wait_for_slots(self) -> None:
        deadline_s = time.monotonic() + HANG_S
        for node in self._layout.nodes if self._testbed.slots else ():
            while self._status(node).idle_slots < self._testbed.slots:
                if time.monotonic() > deadline_s:
                    raise DeadlineExceeded(f"{node.name} has no idle slots.")
                time.sleep(_POLL_S)

    def _status(self, node: NodeLayout) -> pb.NodeStatus:
        token = metadata(self._layout.files.token.read_text())
        with grpc.insecure_channel(f"{node.host}:{node.agent_port}") as channel:
            status: pb.NodeStatus = AgentStub(channel).Describe(
                pb.DescribeRequest(), metadata=token, timeout=HANG_S
            )
        return status

    def _measure(self, gbit: float, node: NodeLayout) -> float:
        size_bytes = int(gbit * 1e9 / 8 * _LINK_S)
        store = s3_client(self._layout)
        listed = store.list_objects_v2(Bucket=BUCKET)["Contents"]
        largest = max(listed, key=lambda entry: int(entry["Size"]))
        url = urlsplit(
            store.generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": largest["Key"]})
        )
        assert node.network_namespace is not None
        with inside(node.network_namespace):
            connection = http.client.HTTPConnection(url.netloc, timeout=HANG_S)
            began_s = time.monotonic()
            connection.request("GET", f"{url.path}?{url.query}")
            response, buffer, read_bytes = connection.getresponse(), bytearray(1 << 20), 0
            while read_bytes < size_bytes and (count := response.readinto(buffer)):
                read_bytes += count
            seconds = time.monotonic() - began_s
            connection.close()
        if read_bytes < size_bytes:
            raise Unavailable(f"{node.name} got {read_bytes} bytes of {url.path}.")
        return read_bytes / seconds


def _written_bytes(variant: Variant) -> int:
    """Return how much memory a start takes that was free: its weights, and a quarter for more."""
    is_there = variant.weights is Weights.MEMORY
    return 0 if is_there else llama_bytes(SHAPES[variant.checkpoint]) * 5 // 4


if __name__ == "__main__":
    main()
