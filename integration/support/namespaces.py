"""Network namespaces on one machine: a hub, and a node each with a bandwidth cap on the way in.

A bridge in the hub joins them; `tc tbf` at the hub's end of each node's cable limits what reaches
the node. Needs root and iproute2; nothing exists outside the namespaces.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from paraserve_backend.errors import ParaServeError

#: Names of our namespaces start with it, so that those of a crashed run can be removed.
PREFIX = "paraserve-"
HUB = f"{PREFIX}hub"
HUB_HOST = "10.77.0.1"
_BRIDGE = "br0"
_RUN_NETNS = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
#: One timer tick's worth at 10 Gbit/s; a smaller bucket would cap the rate itself.
_BURST = "1mb"


def node_namespace(number: int) -> str:
    """Return the namespace of a node; they count from 1."""
    return f"{PREFIX}node{number}"


def node_host(number: int) -> str:
    return f"10.77.1.{number}"


def missing_requirement() -> str | None:
    """Return why namespaces cannot be used here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is missing: apt-get install iproute2"
    return None


def make_namespaces(rates_bits_per_s: Sequence[float]) -> None:
    """Make the hub and a node for each rate, which limits what reaches it."""
    _ip("netns", "add", HUB)
    _ip("-n", HUB, "link", "set", "lo", "up")
    _ip("-n", HUB, "link", "add", _BRIDGE, "type", "bridge")
    _ip("-n", HUB, "addr", "add", f"{HUB_HOST}/16", "dev", _BRIDGE)
    _ip("-n", HUB, "link", "set", _BRIDGE, "up")
    for number, rate_bits_per_s in enumerate(rates_bits_per_s, start=1):
        _add_node(number, rate_bits_per_s)


def sweep_namespaces() -> None:
    """Remove our namespaces and what still runs in them."""
    if not _RUN_NETNS.exists():
        return
    for path in sorted(_RUN_NETNS.glob(f"{PREFIX}*")):
        for pid in processes_in(path.name):
            os.kill(pid, signal.SIGKILL)
        _ip("netns", "delete", path.name)


def processes_in(namespace: str) -> list[int]:
    return [int(pid) for pid in _ip("netns", "pids", namespace).split()]


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Move the calling thread, and all threads it starts in the body, into a namespace.

    Enter it before anything has started a thread that shall use that network, gRPC's included.
    """
    with Path("/proc/thread-self/ns/net").open() as outside:
        with (_RUN_NETNS / namespace).open() as wanted:
            _set_namespace(wanted.fileno())
        try:
            yield
        finally:
            _set_namespace(outside.fileno())


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _add_node(number: int, rate_bits_per_s: float) -> None:
    namespace, cable = node_namespace(number), f"node{number}"
    _ip("netns", "add", namespace)
    _ip("-n", namespace, "link", "set", "lo", "up")
    peer = ("peer", "name", "eth0", "netns", namespace)
    _ip("link", "add", cable, "netns", HUB, "type", "veth", *peer)
    _ip("-n", HUB, "link", "set", cable, "master", _BRIDGE, "up")
    _ip("-n", namespace, "addr", "add", f"{node_host(number)}/16", "dev", "eth0")
    _ip("-n", namespace, "link", "set", "eth0", "up")
    shape = ("rate", f"{rate_bits_per_s:.0f}bit", "burst", _BURST, "latency", "50ms")
    _run("tc", "-n", HUB, "qdisc", "add", "dev", cable, "root", "tbf", *shape)


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ParaServeError(f"{' '.join(command)} failed: {done.stderr.strip()}.")
    return done.stdout
