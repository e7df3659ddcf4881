"""Which devices this host has, and its kind of hardware, as the kernel reports them."""

from __future__ import annotations

from pathlib import Path


def hardware_kind(proc: Path) -> str:
    """Return what tells nodes of equal speed from others: the GPU's model, else the processor's."""
    for path in sorted((proc / "driver" / "nvidia" / "gpus").glob("*/information")):
        model = _field(path, "Model")
        if model:
            return model
    return _field(proc / "cpuinfo", "model name")


def _field(path: Path, name: str) -> str:
    """The value of the first `name: value` line of a kernel's file; empty where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() == name), "")


def find_devices(dev: Path) -> tuple[str, ...]:
    """Return "cuda:<i>" for each NVIDIA device file, or "cpu"; torch is not asked, it is slow."""
    numbers = sorted(
        int(path.name.removeprefix("nvidia"))
        for path in dev.glob("nvidia*")
        if path.name.removeprefix("nvidia").isdecimal()
    )
    return tuple(f"cuda:{index}" for index in range(len(numbers))) or ("cpu",)
