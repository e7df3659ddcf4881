"""Clients that keep asking one deployment while something happens to its replicas."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from integration.support.tiny_cluster import Stream, TinyCluster, prompts, wait_until
from paraserve_backend.rpc import paraserve_pb2 as pb

MODEL = "llama-sharded"
MAX_TOKENS = 200
PROMPTS = prompts(6)


@dataclass(slots=True)
class Load:
    """Clients that ask one request after the other until they are told to stop."""

    cluster: TinyCluster
    name: str
    expected: list[list[int]]
    stopping: threading.Event = field(default_factory=threading.Event)
    #: Of every whole answer, seconds since the epoch: asked, ended.
    answers: list[tuple[float, float]] = field(default_factory=list)

    def run(self, client: int) -> None:
        number = client
        while not self.stopping.is_set():
            index = number % len(PROMPTS)
            asked_s = time.time()
            ids = Stream(self.cluster, self.name, PROMPTS[index], MAX_TOKENS).all_ids()
            assert ids == self.expected[index]
            self.answers.append((asked_s, time.time()))
            number += 1

    def spanning(self, begin_s: float, end_s: float) -> int:
        """How many requests ran from before `begin_s` until after `end_s`."""
        return sum(asked < begin_s and end > end_s for asked, end in self.answers)


@contextlib.contextmanager
def load(
    cluster: TinyCluster, name: str, expected: list[list[int]], clients: int
) -> Iterator[Load]:
    """Keep so many requests running; after the body every one of them must have been right."""
    running = Load(cluster, name, expected)
    with ThreadPoolExecutor(clients) as threads:
        futures = [threads.submit(running.run, client) for client in range(clients)]
        try:
            yield running
        finally:
            running.stopping.set()
    for future in futures:
        future.result()


@contextlib.contextmanager
def deployed(
    cluster: TinyCluster, name: str, max_stages: int, max_sequences: int = 16, max_replicas: int = 1
) -> Iterator[str]:
    cluster.client.deploy(
        pb.DeploymentSpec(
            name=name,
            source=cluster.sources[MODEL],
            max_stages=max_stages,
            max_sequences=max_sequences,
            max_replicas=max_replicas,
            max_context=512,
            keep_alive_s=600,
        )
    )
    cluster.until_known(name)
    try:
        yield name
    finally:
        cluster.client.delete(name)


def replicas(cluster: TinyCluster, name: str) -> dict[str, pb.ReplicaStatus]:
    (deployment,) = cluster.client.status(name).deployments
    return {replica.replica: replica for replica in deployment.replicas}


def serving(cluster: TinyCluster, name: str) -> list[pb.ReplicaStatus]:
    return [r for r in replicas(cluster, name).values() if r.phase == pb.READY]


def wait_until_gone(cluster: TinyCluster, name: str, replica: str) -> pb.ReplicaStatus:
    """Wait until a replica has been removed from all nodes; returns its last status."""
    wait_until(lambda: replicas(cluster, name)[replica].removed_s > 0)
    return replicas(cluster, name)[replica]
