"""A package on sys.path that offers engines, as far as importlib.metadata can tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from paraserve_backend.engines.entry_points import GROUP


def write_engine_package(folder: Path, package: str, engines: Mapping[str, str]) -> None:
    """Make `folder`, once it is on sys.path, offer engines: name -> "module:attribute"."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"[{GROUP}]", *(f"{name} = {value}" for name, value in engines.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
