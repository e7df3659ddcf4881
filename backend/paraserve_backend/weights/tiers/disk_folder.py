"""How a disk tier lies in its folder; all of it can be read without opening the tier.

objects/<name>/object.json                which object version the extents are of
objects/<name>/<start>-<end>-<checksum>   one extent each; used last when it was modified last
lock
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from paraserve_backend.weights.sources.base import StoredObject, check_key
from paraserve_backend.weights.tiers.disk_format import DiskExtent
from paraserve_backend.weights.tiers.layout import OBJECTS, object_name, write_atomically

_OBJECT = "object.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One extent of the object with this file name."""

    name: str
    extent: DiskExtent

    def path(self, directory: Path) -> Path:
        return directory / OBJECTS / self.name / self.extent.file_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The object version that a folder is for."""

    source_uri: str
    stored: StoredObject

    @property
    def name(self) -> str:
        return object_name(self.source_uri, self.stored)

    def make_folder(self, directory: Path) -> Path:
        """Make the folder for this object's extents, if it is not there."""
        folder = directory / OBJECTS / self.name
        if not (folder / _OBJECT).exists():
            folder.mkdir(exist_ok=True)
            write_atomically(folder / _OBJECT, json.dumps(asdict(self)).encode())
        return folder

    @classmethod
    def read(cls, folder: Path) -> Identity | None:
        """Return what `make_folder` wrote; `None` where the folder is not one of these."""
        try:
            fields = json.loads((folder / _OBJECT).read_bytes())
            stored = StoredObject(**fields["stored"])
            check_key(stored.key)
            found = cls(source_uri=fields["source_uri"], stored=stored)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return found if found.name == folder.name else None


def object_folders(directory: Path) -> list[Path]:
    return sorted((directory / OBJECTS).iterdir())


def whole_extents(folder: Path) -> Iterator[tuple[int, Held]]:
    """Yield when each extent of an object was used (ns) and it, if its file has the right size."""
    for path in folder.iterdir():
        extent = DiskExtent.parse(path.name)
        if extent is not None and path.stat().st_size == extent.size_bytes:
            yield path.stat().st_mtime_ns, Held(name=folder.name, extent=extent)


def strange_files(folder: Path, known: Iterable[Held]) -> list[Path]:
    """Return the files in an object's folder that are neither `known` nor its identity."""
    expected = {_OBJECT, *(held.extent.file_name for held in known if held.name == folder.name)}
    return sorted(path for path in folder.iterdir() if path.name not in expected)


def disk_problems(directory: Path, known: Iterable[Held]) -> Iterator[str]:
    """Yield one sentence for everything in the folder that is not as `known` says."""
    known = tuple(known)
    for folder in object_folders(directory):
        for path in strange_files(folder, known):
            yield f"{path} is no whole extent that is known"
    for held in known:
        path = held.path(directory)
        if not path.exists():
            yield f"{path} is missing"
        elif path.stat().st_size != held.extent.size_bytes:
            yield f"{path} has {path.stat().st_size} bytes"
