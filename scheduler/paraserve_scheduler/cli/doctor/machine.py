"""Checks a machine for a local cluster: one finding per thing needed, and how to get it.

Every check takes what it judges as arguments; only one function looks at the machine.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from paraserve_backend.errors import NotFound
from paraserve_backend.machine.devices import find_devices
from paraserve_backend.machine.memory import available_bytes
from paraserve_backend.tritonserver.host.install import find_libpython, find_triton
from paraserve_scheduler.local.layout import SHM
from paraserve_scheduler.local.ports import is_free

_GB = 1e9
_LEAST_SHM_BYTES = 1_000_000_000
_LEAST_MEMORY_BYTES = 4_000_000_000
#: Default ports of the daemons and of Triton beside them.
_PORTS = (8000, 8001, 8470, 8500)
#: Package to (why it is needed, how to get it).
_PACKAGES = {
    "torch": ("the engine", "pip install 'paraserve[worker]'"),
    "tokenizers": ("text to tokens", "pip install 'paraserve[worker]'"),
    "tritonclient": ("requests", "pip install paraserve"),
    "aiohttp": ("the HTTP gateway", "pip install paraserve"),
}


class State(StrEnum):
    OK = "ok"
    MISSING = "missing"
    #: Not there, and only needed for some things.
    ABSENT = "absent"
    #: There, and not as it was written.
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    name: str
    state: State
    detail: str
    #: What to do about it; empty where nothing is wrong.
    remedy: str = ""


def examine(environ: Mapping[str, str]) -> tuple[Finding, ...]:
    """Check this machine; importing torch takes seconds."""
    return (
        check_python(sys.version_info[:2]),
        check_found("libpython", lambda: str(find_libpython())),
        check_found("Triton and its Python stub", lambda: str(find_triton().server)),
        check_numpy(_version("numpy")),
        *(check_package(name, _import(name)) for name in _PACKAGES),
        check_tool(
            "rclone", _tool("rclone", environ), State.MISSING, "pip install 'paraserve[local]'"
        ),
        check_shm(shutil.disk_usage(SHM).free if SHM.exists() else 0),
        check_huge_pages(huge_pages_of(Path("/proc/mounts").read_text(encoding="utf-8"))),
        check_memory(available_bytes(Path("/proc"))),
        check_ports([port for port in _PORTS if not is_free("127.0.0.1", port)]),
        check_root(os.geteuid() == 0),
        *(
            check_tool(
                name,
                _tool(name, environ),
                State.ABSENT,
                "for make bench-*: apt-get install iproute2",
            )
            for name in ("ip", "tc")
        ),
        check_gpu(find_devices(Path("/dev"))),
    )


def check_python(version: tuple[int, int]) -> Finding:
    said = f"{version[0]}.{version[1]}"
    if version >= (3, 11):
        return _ok("Python", said)
    return _missing("Python", said, "make the environment with Python 3.11 or newer")


def check_found(name: str, find: Callable[[], str]) -> Finding:
    """Check something whose finder raises NotFound with a sentence that says what to do."""
    try:
        return _ok(name, find())
    except NotFound as error:
        what, _, remedy = str(error).rstrip(".").rpartition(": ")
        return _missing(name, what, remedy)


def check_numpy(version: str | None) -> Finding:
    if version is None:
        return _missing("numpy", "not installed", "pip install 'numpy<2'")
    if int(version.split(".")[0]) >= 2:
        return _missing(
            "numpy", f"{version}, which Triton's stub corrupts silently", "pip install 'numpy<2'"
        )
    return _ok("numpy", version)


def check_package(name: str, version: str | None) -> Finding:
    purpose, remedy = _PACKAGES[name]
    if version is None:
        return _missing(name, f"cannot be imported ({purpose})", remedy)
    return _ok(name, version)


def check_tool(name: str, path: str | None, otherwise: State, remedy: str) -> Finding:
    if path is not None:
        return _ok(name, path)
    return Finding(name=name, state=otherwise, detail="not found", remedy=remedy)


def check_shm(free_bytes: int) -> Finding:
    said = f"{free_bytes / _GB:.1f} GB free"
    if free_bytes >= _LEAST_SHM_BYTES:
        return _ok(str(SHM), said)
    return _missing(
        str(SHM), said, "weights lie there: free some, or start the container with --shm-size=8g"
    )


def huge_pages_of(mounts: str) -> str:
    """Return what option `huge` of host memory is, given the lines of /proc/mounts."""
    for _, folder, _, options, *_ in map(str.split, mounts.splitlines()):
        if folder == str(SHM):
            found = [option for option in options.split(",") if option.startswith("huge=")]
            return found[-1].removeprefix("huge=") if found else "never"
    return "never"


def check_huge_pages(huge: str) -> Finding:
    if huge != "never":
        return _ok("huge pages", f"{huge} in {SHM}")
    return Finding(
        name="huge pages",
        state=State.ABSENT,
        detail=f"none in {SHM}",
        remedy=f"weights load sooner with them: mount -o remount,huge=within_size {SHM}",
    )


def check_memory(free_bytes: int) -> Finding:
    said = f"{free_bytes / _GB:.1f} GB free"
    if free_bytes >= _LEAST_MEMORY_BYTES:
        return _ok("memory", said)
    return _missing("memory", said, f"free {_LEAST_MEMORY_BYTES / _GB:.0f} GB or use fewer nodes")


def check_ports(taken: list[int]) -> Finding:
    if not taken:
        return _ok("default ports", "free")
    named = ", ".join(map(str, taken))
    return Finding(
        name="default ports",
        state=State.ABSENT,
        detail=f"{named} in use",
        remedy="paraserve up takes others; give daemons other addresses",
    )


def check_root(is_root: bool) -> Finding:
    if is_root:
        return _ok("root", "yes")
    return Finding(
        name="root",
        state=State.ABSENT,
        detail="no",
        remedy="network namespaces of the benchmarks need it: sudo make bench-coldstart-smoke",
    )


def check_gpu(devices: tuple[str, ...]) -> Finding:
    if devices == ("cpu",):
        return Finding(
            name="GPU", state=State.ABSENT, detail="none", remedy="models run on the CPU"
        )
    return _ok("GPU", ", ".join(devices))


def _ok(name: str, detail: str) -> Finding:
    return Finding(name=name, state=State.OK, detail=detail)


def _missing(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name=name, state=State.MISSING, detail=detail, remedy=remedy)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import(package: str) -> str | None:
    """Return the version of a package if it can be imported."""
    try:
        importlib.import_module(package)
    except ImportError:
        return None
    return _version(package)


def _tool(name: str, environ: Mapping[str, str]) -> str | None:
    # Tools of this environment are there even if it is not activated.
    beside_python = str(Path(sys.executable).parent)
    return shutil.which(name, path=f"{beside_python}:{environ.get('PATH', '')}:/usr/sbin:/sbin")
