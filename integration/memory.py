"""Memory of a benchmark: what model processes have, and that the machine really has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from integration.namespaces import processes_in
from paraserve_backend.agent.node import available_bytes
from paraserve_backend.triton_install import STUB_NAME
from paraserve_scheduler.doctor import huge_pages_of
from paraserve_scheduler.local.layout import SHM, NodeLayout

_PROC = Path("/proc")
_STEP_BYTES = 8 << 20
#: Of what is free.
_TOUCHED_SHARE = 0.6


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


def touch_memory(size_bytes: int | None = None) -> None:
    """Write to so much of the free memory once, most of it unless stated, and free it again.

    A virtual machine's memory is backed by its host when it is first written to, which can take
    several times as long as the writing. What is measured afterwards finds it there, as on a
    machine of its own.
    """
    content = bytes(_STEP_BYTES)
    free_bytes = min(available_bytes(_PROC), shutil.disk_usage(SHM).free)
    most_bytes = int(free_bytes * _TOUCHED_SHARE)
    touched_bytes = most_bytes if size_bytes is None else min(size_bytes, most_bytes)
    with tempfile.TemporaryFile(dir=SHM) as file:
        file.truncate(touched_bytes)  # only pages within a file's size can be huge
        for _ in range(touched_bytes // _STEP_BYTES):
            file.write(content)


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
