"""A local cluster whose nodes have a network each, with a bandwidth cap on the way in.

Every node runs in its own network namespace, and so do scheduler, gateway and S3 server together
(the hub). A bridge in the hub joins them; `tc tbf` at the hub's end of each node's cable limits
what reaches the node. Needs root and iproute2; nothing exists outside the namespaces.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from paraserve_backend.errors import ParaServeError, Unavailable
from paraserve_scheduler.local.cluster import Progress, down, files_of, up
from paraserve_scheduler.local.layout import ClusterFiles, ClusterLayout, NodeLayout

#: Names of our namespaces start with it, so that those of a crashed run can be removed.
PREFIX = "paraserve-"
HUB = f"{PREFIX}hub"
_HUB_HOST = "10.77.0.1"
_BRIDGE = "br0"
_CHANNEL_PORTS = (18600, 18700)
_RUN_NETNS = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
#: One timer tick's worth at 10 Gbit/s; a smaller bucket would cap the rate itself.
_BURST = "1mb"


@dataclass(frozen=True, slots=True, kw_only=True)
class CappedCluster:
    nodes: int
    #: What reaches each node at most.
    rate_bits_per_s: float
    node_memory_bytes: int
    #: What stays in a node's memory when its replica is gone. None: the agents' default.
    tier_bytes: int | None = 0
    name: str = "capped"


def missing_requirement() -> str | None:
    """Return why namespaces cannot be used here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is missing: apt-get install iproute2"
    return None


@contextmanager
def capped_cluster(
    wanted: CappedCluster,
    environ: Mapping[str, str],
    on_progress: Callable[[Progress], None] = lambda _progress: None,
) -> Iterator[ClusterLayout]:
    """Bring up a cluster with capped nodes; everything is gone after the body.

    Addresses in the layout are those inside the namespaces: use `inside_hub` to reach them.

    Raises:
        Unavailable: this machine cannot have namespaces, or a process did not start.
    """
    reason = missing_requirement()
    if reason is not None:
        raise Unavailable(f"No cluster with capped nodes: {reason}.")
    files = files_of(wanted.name, environ)
    try:
        down(files, delete=True)  # of a run that was killed
        sweep_namespaces()
        make_namespaces(wanted)
        layout = capped_layout(wanted, files)
        up(layout, on_progress, prefix=("ip", "netns", "exec", HUB))
        yield layout
    finally:
        down(files, delete=True)
        sweep_namespaces()


def capped_layout(wanted: CappedCluster, files: ClusterFiles) -> ClusterLayout:
    """Return a layout with one host per node; the ports are the same on all of them."""
    return ClusterLayout(
        name=wanted.name,
        host=_HUB_HOST,
        scheduler_port=8470,
        gateway_grpc_port=8001,
        gateway_http_port=8000,
        s3_port=9000,
        nodes=tuple(_node(number, wanted) for number in range(1, wanted.nodes + 1)),
        state_dir=files.state_dir,
        # The same for any number of nodes, so that runs can be compared.
        compute_threads=1,
    )


def make_namespaces(wanted: CappedCluster) -> None:
    _ip("netns", "add", HUB)
    _ip("-n", HUB, "link", "set", "lo", "up")
    _ip("-n", HUB, "link", "add", _BRIDGE, "type", "bridge")
    _ip("-n", HUB, "addr", "add", f"{_HUB_HOST}/16", "dev", _BRIDGE)
    _ip("-n", HUB, "link", "set", _BRIDGE, "up")
    for number in range(1, wanted.nodes + 1):
        _add_node(number, wanted.rate_bits_per_s)


def sweep_namespaces() -> None:
    """Remove our namespaces and what still runs in them."""
    if not _RUN_NETNS.exists():
        return
    for path in sorted(_RUN_NETNS.glob(f"{PREFIX}*")):
        for pid in _ip("netns", "pids", path.name).split():
            os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "delete", path.name)


@contextmanager
def inside_hub() -> Iterator[None]:
    """Move the calling thread, and all threads it starts in the body, into the hub's network.

    Enter it before anything has started a thread that shall use that network, gRPC's included.
    """
    with Path("/proc/self/ns/net").open() as outside:
        with (_RUN_NETNS / HUB).open() as hub:
            _set_namespace(hub.fileno())
        try:
            yield
        finally:
            _set_namespace(outside.fileno())


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _add_node(number: int, rate_bits_per_s: float) -> None:
    namespace, cable = _namespace(number), f"node{number}"
    _ip("netns", "add", namespace)
    _ip("-n", namespace, "link", "set", "lo", "up")
    _ip(
        "link",
        "add",
        cable,
        "netns",
        HUB,
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        namespace,
    )
    _ip("-n", HUB, "link", "set", cable, "master", _BRIDGE, "up")
    _ip("-n", namespace, "addr", "add", f"{_host(number)}/16", "dev", "eth0")
    _ip("-n", namespace, "link", "set", "eth0", "up")
    rate = f"{rate_bits_per_s:.0f}bit"
    _run(
        "tc",
        "-n",
        HUB,
        "qdisc",
        "add",
        "dev",
        cable,
        "root",
        "tbf",
        "rate",
        rate,
        "burst",
        _BURST,
        "latency",
        "50ms",
    )


def _node(number: int, wanted: CappedCluster) -> NodeLayout:
    return NodeLayout(
        name=f"node{number}",
        host=_host(number),
        triton_grpc_port=8001,
        triton_http_port=8000,
        triton_metrics_port=8002,
        agent_port=8500,
        channel_port_start=_CHANNEL_PORTS[0],
        channel_port_end=_CHANNEL_PORTS[1],
        memory_bytes=wanted.node_memory_bytes,
        nic_bytes_per_s=wanted.rate_bits_per_s / 8,
        tier_bytes=wanted.tier_bytes,
        network_namespace=_namespace(number),
    )


def _namespace(number: int) -> str:
    return f"{PREFIX}node{number}"


def _host(number: int) -> str:
    return f"10.77.1.{number}"


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ParaServeError(f"{' '.join(command)} failed: {done.stderr.strip()}.")
    return done.stdout
