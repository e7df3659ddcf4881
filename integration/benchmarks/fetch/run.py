"""The weight fetch beside other S3 clients: line rate and CPU time on nodes of 1 Gbit/s.

    python -m integration.benchmarks.fetch.run [--gbit 1] [--megabytes 1000]

Each client reads the same object from the same nginx, which ignores signatures, first on one node
and then on four at once, each in a network namespace of its own. Needs root, iproute2, nginx and
the extra `bench`. The last line is JSON; the exit status is 1 if a target was missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from integration.benchmarks.fetch.clients import (
    BUCKET,
    CLIENTS,
    OBJECT,
    environment,
)
from integration.support import capped_cluster, namespaces, static_server
from integration.support.memory import backed_memory, huge_pages
from paraserve_backend.errors import ParaServeError
from paraserve_scheduler.local.cluster import files_of
from paraserve_scheduler.local.layout import SHM, ClusterLayout, NodeLayout

NODES = 4
OURS = "paraserve"
_MODULES = ("boto3", "awscrt", "obstore", "runai_model_streamer")
_PORT = 80
#: Payload of a full Ethernet frame, and what the cap counts of it.
_PAYLOAD_SHARE = 1448 / 1514
#: Largest distance from the line rate.
LINE_RATE_MARGIN = 0.03
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What one process reported."""

    mb_per_s: float
    cpu_s_per_gb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    endpoint: str
    size_bytes: int
    crc32: int


def main() -> int:
    arguments = _parse()
    reason = missing_requirement()
    if reason is not None:
        sys.stdout.write(f"Skipped: {reason}.\n")
        sys.stdout.write(json.dumps({"bench": "fetch", "skipped": reason}) + "\n")
        return 0
    rate_bits_per_s = arguments.gbit * 1e9
    with capped_store(rate_bits_per_s, arguments.megabytes * 1_000_000) as (layout, store):
        fetched = {
            (client, nodes): _fetch_on(layout.nodes[:nodes], client, store)
            for nodes in (1, NODES)
            for client in CLIENTS
        }
    result = summary(fetched, line_rate_mb_per_s=rate_bits_per_s / 8e6 * _PAYLOAD_SHARE)
    sys.stdout.write(json.dumps(result) + "\n")
    return 0 if result["met"] else 1


def missing_requirement() -> str | None:
    reason = namespaces.missing_requirement() or static_server.missing_requirement()
    if reason is not None:
        return reason
    for module in _MODULES:
        if importlib.util.find_spec(module) is None:
            return f"Python module {module} is missing: pip install -e '.[bench]'"
    return None


@contextmanager
def capped_store(rate_bits_per_s: float, size_bytes: int) -> Iterator[tuple[ClusterLayout, Store]]:
    """Make the nodes' networks and serve one object in the hub; all is gone after the body."""
    wanted = capped_cluster.CappedCluster(
        rates_bits_per_s=(rate_bits_per_s,) * NODES, node_memory_bytes=size_bytes, name="fetch"
    )
    layout = capped_cluster.capped_layout(wanted, files_of(wanted.name, os.environ))
    with ExitStack() as stack:
        stack.enter_context(huge_pages())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        crc32 = write_object(folder / BUCKET / OBJECT, size_bytes)
        namespaces.sweep_namespaces()  # of a run that was killed
        stack.callback(namespaces.sweep_namespaces)
        namespaces.make_namespaces(wanted.rates_bits_per_s)
        with namespaces.inside(namespaces.HUB):
            stack.enter_context(static_server.static_server(folder, folder, layout.host, _PORT))
        endpoint = f"http://{layout.host}:{_PORT}"
        yield layout, Store(endpoint=endpoint, size_bytes=size_bytes, crc32=crc32)


def write_object(path: Path, size_bytes: int) -> int:
    """Write random bytes and return their checksum."""
    path.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    checksum = 0
    with path.open("wb") as file:
        for start in range(0, size_bytes, _CHUNK_BYTES):
            chunk = rng.bytes(min(_CHUNK_BYTES, size_bytes - start))
            checksum = zlib.crc32(chunk, checksum)
            file.write(chunk)
    return checksum


def _fetch_on(nodes: Sequence[NodeLayout], client: str, store: Store) -> list[Fetched]:
    """Let one client fetch on all nodes at the same moment."""
    with ExitStack() as stack:
        stack.enter_context(backed_memory(2 * len(nodes) * store.size_bytes))
        processes = [stack.enter_context(_client(node, client, store)) for node in nodes]
        for process in processes:
            _line(process, client)  # "ready"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        fetched = [read_report(_line(process, client), store) for process in processes]
    for number, each in enumerate(fetched, start=1):
        sys.stdout.write(
            f"{client:>9} node {number} of {len(nodes)}: {each.mb_per_s:6.1f} MB/s, "
            f"{each.cpu_s_per_gb:.2f} CPU-s/GB\n"
        )
    sys.stdout.flush()
    return fetched


@contextmanager
def _client(node: NodeLayout, client: str, store: Store) -> Iterator[subprocess.Popen[str]]:
    assert node.network_namespace is not None
    folder = Path(tempfile.mkdtemp(prefix="paraserve-bench-", dir=SHM))
    process = subprocess.Popen(
        [
            *("ip", "netns", "exec", node.network_namespace),
            *(sys.executable, "-m", "integration.benchmarks.fetch.clients"),
            *(client, store.endpoint, str(store.size_bytes), str(folder)),
        ],
        env={**os.environ, **environment(store.endpoint)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        shutil.rmtree(folder)


def _line(process: subprocess.Popen[str], client: str) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise ParaServeError(f"Client {client} ended without a report; see above.")
    return line


def read_report(line: str, store: Store) -> Fetched:
    report = json.loads(line)
    if report["crc32"] != store.crc32:
        raise ParaServeError("A client read other bytes than the object has.")
    return Fetched(
        mb_per_s=store.size_bytes / report["seconds"] / 1e6,
        cpu_s_per_gb=report["cpu_s"] / store.size_bytes * 1e9,
    )


def summary(
    fetched: Mapping[tuple[str, int], Sequence[Fetched]], *, line_rate_mb_per_s: float
) -> dict[str, object]:
    """Return the last line: the slowest node's rate, and the mean CPU time of all nodes."""
    figures = {
        f"{client}_{nodes}": {
            "mb_per_s": round(min(each.mb_per_s for each in runs), 1),
            "cpu_s_per_gb": round(statistics.mean(each.cpu_s_per_gb for each in runs), 2),
        }
        for (client, nodes), runs in fetched.items()
    }
    least_mb_per_s = (1 - LINE_RATE_MARGIN) * line_rate_mb_per_s
    missed = []
    for nodes in sorted({nodes for _, nodes in fetched}):
        ours = figures[f"{OURS}_{nodes}"]
        others = [
            figures[f"{client}_{count}"]["cpu_s_per_gb"]
            for client, count in fetched
            if count == nodes and client != OURS
        ]
        if ours["mb_per_s"] < least_mb_per_s:
            missed.append(f"line_rate_{nodes}")
        if ours["cpu_s_per_gb"] > min(others):
            missed.append(f"cpu_{nodes}")
    return {
        "bench": "fetch",
        "line_rate_mb_per_s": round(line_rate_mb_per_s, 1),
        "figures": figures,
        "targets": {
            "paraserve_mb_per_s": round(least_mb_per_s, 1),
            "paraserve_cpu_s_per_gb": "lowest",
        },
        "missed": missed,
        "met": not missed,
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The weight fetch beside other S3 clients.")
    parser.add_argument("--gbit", type=float, default=1.0, help="of each node's network")
    parser.add_argument("--megabytes", type=int, default=1000, help="of the object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
