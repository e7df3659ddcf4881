"""Reads a fetch in another process than its writer, while it still runs.

Tensors are views of the tier's memory; nothing is copied.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from paraserve_backend.errors import DeadlineExceeded, NotFound
from paraserve_backend.protocol.run_dir import TierDir
from paraserve_backend.weights.checkpoint.safetensors import TensorEntry
from paraserve_backend.weights.sources.base import ObjectRange, StoredObject
from paraserve_backend.weights.tiers.layout import (
    FILES,
    OBJECTS,
    PROGRESS,
    FetchStatus,
    Manifest,
    PartTable,
    ProgressFile,
    object_name,
)

#: First pause between two looks at a fetch, and the longest: that of who has waited for long.
_FIRST_POLL_S, _LONGEST_POLL_S = 0.001, 0.005
#: Linux's MAP_NORESERVE, which Python's mmap names only from 3.13 on.
_MAP_NORESERVE = 0x4000


class TierReader:
    """One thread's view of one fetch.

    Views stay valid for as long as they are held, but their bytes only until the fetch is
    released.
    """

    def __init__(self, tier_dir: Path, manifest: Manifest) -> None:
        self.plan = manifest.plan
        self._tier_dir = tier_dir
        self._fetch_dir = TierDir(tier_dir).fetch(manifest.plan.fetch_id)
        self._tensors = {tensor.name: tensor for tensor in manifest.plan.tensors}
        self._table = PartTable(manifest.parts)
        self._progress = ProgressFile(
            self._fetch_dir / PROGRESS, parts=len(self._table.parts), writable=False
        )
        self._maps: dict[str, mmap.mmap] = {}

    @classmethod
    def open(cls, tier_dir: Path, fetch_id: str) -> TierReader:
        """Open a fetch that `Tier.begin` has made; raises `NotFound` where there is none."""
        try:
            return cls(tier_dir, Manifest.read(TierDir(tier_dir).fetch(fetch_id)))
        except FileNotFoundError:
            raise NotFound(f"there is no fetch {fetch_id} in the tier {tier_dir}") from None

    @property
    def folder(self) -> Path:
        """The fetch's own folder, which goes when the fetch is released."""
        return self._fetch_dir

    def object_path(self, key: str) -> Path:
        """Return the file that holds an object; it has holes where nothing was fetched."""
        stored = next(stored for stored in self.plan.objects if stored.key == key)
        name = object_name(self.plan.store, self.plan.source_uri, stored)
        return self._tier_dir / OBJECTS / name

    def entry(self, name: str) -> TensorEntry:
        """Raises `NotFound` where the fetch has no such tensor."""
        try:
            return self._tensors[name]
        except KeyError:
            raise NotFound(f"fetch {self.plan.fetch_id} has no tensor {name}") from None

    def has_landed(self, name: str) -> bool:
        tensor = self.entry(name)
        wanted = ObjectRange(object_key=tensor.object_key, start=tensor.start, end=tensor.end)
        return all(self._progress.has_landed(part) for part in self._table.covering(wanted))

    def wait_for(self, name: str, *, timeout_s: float) -> None:
        """Return once the tensor's bytes are in place.

        Raises the fetch's own error if it fails before, `DeadlineExceeded` after `timeout_s`.
        """
        self._wait_until(lambda: self.has_landed(name), f"tensor {name}", timeout_s)

    def iter_landed(self, names: Iterable[str], *, timeout_s: float) -> Iterator[str]:
        """Yield each name once its bytes are in place, in the order in which they land.

        Raises what `wait_for` does; `timeout_s` is for the next one, not for all.
        """
        waiting = list(dict.fromkeys(names))
        while waiting:
            seen = self._progress.snapshot()
            landed = {name for name in waiting if self.has_landed(name)}
            yield from (name for name in waiting if name in landed)
            waiting = [name for name in waiting if name not in landed]
            if waiting and not landed:
                # Asking each of many tensors again every millisecond would take a core.
                self._wait_for_change(seen, f"{len(waiting)} tensors", timeout_s)

    def view(self, name: str) -> memoryview:
        """Return a tensor's bytes; what they are before it has landed is undefined.

        The view is writable, but private: a write is never seen by another process.
        """
        tensor = self.entry(name)
        if tensor.size_bytes == 0:
            return memoryview(bytearray())
        return memoryview(self._object_map(tensor.object_key))[tensor.start : tensor.end]

    def read_file(self, key: str, *, timeout_s: float) -> bytes:
        """Return a small file; raises `NotFound` where the model has none, else as `wait_for`."""
        if all(stored.key != key for stored in self.plan.files):
            raise NotFound(f"the model of fetch {self.plan.fetch_id} has no file {key}")
        path = self._fetch_dir / FILES / key
        self._wait_until(path.exists, key, timeout_s)
        return path.read_bytes()

    def _wait_for_change(self, seen: bytes, what: str, timeout_s: float) -> None:
        self._wait_until(lambda: self._progress.snapshot() != seen, what, timeout_s)

    def _wait_until(self, ready: Callable[[], bool], what: str, timeout_s: float) -> None:
        began_s = time.monotonic()
        while not ready():
            waited_s = time.monotonic() - began_s
            if self._progress.status is FetchStatus.FAILED:
                raise self._progress.error()
            if waited_s > timeout_s:
                raise DeadlineExceeded(
                    f"{what} of fetch {self.plan.fetch_id} did not arrive within {timeout_s:g} s"
                )
            time.sleep(min(_LONGEST_POLL_S, max(_FIRST_POLL_S, waited_s / 50)))

    def _object_map(self, key: str) -> mmap.mmap:
        if key not in self._maps:
            stored = next(stored for stored in self.plan.objects if stored.key == key)
            self._maps[key] = self._map(stored)
        return self._maps[key]

    def _map(self, stored: StoredObject) -> mmap.mmap:
        with self.object_path(stored.key).open("rb") as file:
            # Private and unreserved: an object may be larger than this machine's memory, of which
            # the kernel would else set aside as much, in case every page were written to.
            return mmap.mmap(
                file.fileno(),
                stored.size_bytes,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
