"""Memory of a benchmark: what model processes have, and that the machine really has it."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from math import ceil
from pathlib import Path

from integration.support.namespaces import processes_in
from paraserve_backend.machine.memory import available_bytes
from paraserve_backend.tritonserver.host.install import STUB_NAME
from paraserve_scheduler.cli.doctor.machine import huge_pages_of
from paraserve_scheduler.local.layout import SHM, NodeLayout

_PROC = Path("/proc")
_STEP_BYTES = 8 << 20
#: Of what is available, at most.
_RESERVED_SHARE = 0.6
#: How much is free before it is needed.
_LEAD_BYTES = 256 << 20
_LOOK_S = 0.02


def model_processes_peak_bytes(nodes: Sequence[NodeLayout], model: str = "") -> int:
    """Return the largest resident size that a model process of these nodes has had; 0: none runs.

    Pages shared with other processes count, such as weights in the tier. `model` limits it to the
    processes of one model.
    """
    peaks = [0]
    for node in nodes:
        assert node.network_namespace is not None
        for pid in processes_in(node.network_namespace):
            with suppress(OSError):  # it has ended meanwhile
                peaks.append(_peak_bytes(_PROC / str(pid), model))
    return max(peaks)


@contextmanager
def backed_memory(size_bytes: int) -> Iterator[None]:
    """Let what runs meanwhile find so much of its memory really there, as on a machine of its own.

    The host of a virtual machine backs memory when it is first written to, which can take several
    times as long as the writing, and takes back what has been free for a second or two. So it is
    written to beforehand and given back little by little, as the machine's free memory is used.
    """
    content = bytes(_STEP_BYTES)
    most_bytes = int(min(available_bytes(_PROC), shutil.disk_usage(SHM).free) * _RESERVED_SHARE)
    steps = min(size_bytes, most_bytes) // _STEP_BYTES
    stopping = threading.Event()
    with tempfile.TemporaryFile(dir=SHM, buffering=0) as file:
        file.truncate(steps * _STEP_BYTES)  # only pages within a file's size can be huge
        for _ in range(steps):
            file.write(content)
        least_bytes = _free_bytes() + _LEAD_BYTES
        reserve = threading.Thread(target=_give_back, args=(file, steps, least_bytes, stopping))
        reserve.start()
        try:
            yield
        finally:
            stopping.set()
            reserve.join()


def _give_back(file: io.FileIO, steps: int, least_bytes: int, stopping: threading.Event) -> None:
    """Shorten the file whenever less memory is free, until it is empty or shall stop."""
    while steps and not stopping.is_set():
        short_bytes = least_bytes - _free_bytes()
        if short_bytes > 0:
            steps = max(0, steps - ceil(short_bytes / _STEP_BYTES))
            file.truncate(steps * _STEP_BYTES)
        stopping.wait(_LOOK_S)


@contextmanager
def huge_pages() -> Iterator[None]:
    """Let files in host memory have huge pages meanwhile, as `paraserve doctor` advises.

    Without root everything stays as it is.
    """
    before = huge_pages_of((_PROC / "mounts").read_text(encoding="utf-8"))
    if os.geteuid() != 0:
        yield
        return
    _remount("within_size")
    try:
        yield
    finally:
        _remount(before)


def _free_bytes() -> int:
    """Return what nothing uses, not even the page cache (MemFree)."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _remount(huge: str) -> None:
    subprocess.run(["mount", "-o", f"remount,huge={huge}", str(SHM)], check=True)


def _peak_bytes(process: Path, model: str) -> int:
    command = (process / "cmdline").read_text()
    if STUB_NAME not in command or (model and f"/{model}/" not in command):
        return 0
    for line in (process / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0
