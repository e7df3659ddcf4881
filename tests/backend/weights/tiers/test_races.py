"""Whatever happens at once in a tier, nobody is told of it by an exception, nor waits for long."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from paraserve_backend.agent.disk_upkeep import DiskUpkeep
from paraserve_backend.agent.status import tier_messages
from paraserve_backend.errors import NotFound, Unavailable
from paraserve_backend.weights.fetching.fetch import fetch
from paraserve_backend.weights.sources.open import Sources, open_source
from paraserve_backend.weights.tiers import filesystem
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.layout import OBJECTS
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.reader import TierReader
from tests.support.checkpoints import land, make_plan, tensor_bytes, write_checkpoint
from tests.support.limits import HANG_S

STEPS = 25


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", shards=2, width=512)


class Node:
    """What an agent's threads do with its tiers, each a step that may run at any moment."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.tier = Tier.open(folder / "tier", cache_bytes=1 << 20)
        self.disk = DiskTier.open(folder / "disk", disk_bytes=200_000)
        self.model = model
        self.whole_bytes = make_plan(model).total_bytes
        self._upkeep = DiskUpkeep(self.tier, self.disk)

    def use(self, rng: random.Random) -> None:
        start = rng.randrange(4)
        layers = (start, rng.randrange(start, 4) + 1)
        fetch_id = f"{threading.get_ident()}.1.{rng.randrange(1 << 30)}"
        plan = make_plan(self.model, fetch_id=fetch_id, layers=layers)
        fetch(
            self.tier.begin(plan, part_bytes=8192),
            open_source(str(self.model)),
            self.tier,
            timeout_s=HANG_S,
            cancel=threading.Event(),
            threads=1,
            disk=self.disk,
        )
        reader = TierReader.open(self.tier.directory, fetch_id)
        for tensor in plan.tensors:
            assert bytes(reader.view(tensor.name)) == tensor_bytes(self.model, tensor)
        self.tier.release(fetch_id)

    def limit(self, rng: random.Random) -> None:
        self.tier.limit_cache(rng.choice([0, self.whole_bytes // 3, self.whole_bytes * 2]))

    def report(self, _: random.Random) -> None:
        tier_messages(self.tier, self.disk, Sources())
        assert self.tier.used_bytes >= 0
        assert self.disk.used_bytes >= 0

    def serve(self, rng: random.Random) -> None:
        for found in self.tier.contents(with_files=True):
            self.tier.holdings([found.name])
            start, end = rng.choice(found.landed)
            with suppress(NotFound), self.tier.reading(found.name, (start, end)) as (fd, stored):
                expected = (self.model / stored.key).read_bytes()[start:end]
                assert os.pread(fd, end - start, start) == expected

    def keep(self, _: random.Random) -> None:
        while self._upkeep.write_next():
            pass
        self._upkeep.verify_next()


@pytest.mark.parametrize("seed", range(4))
def test_no_race_in_the_tiers_raises_or_changes_a_byte(
    tmp_path: Path, model: Path, seed: int
) -> None:
    node = Node(tmp_path, model)
    ends = threading.Event()

    def repeat(step: Callable[[random.Random], None], number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        try:
            for _ in range(STEPS):
                if ends.is_set():
                    return
                step(rng)
        except BaseException:
            ends.set()
            raise

    steps = [node.use, node.use, node.limit, node.report, node.serve, node.keep]
    with ThreadPoolExecutor(len(steps)) as pool:
        running = [pool.submit(repeat, step, number) for number, step in enumerate(steps)]
    for each in running:
        each.result()
    assert node.tier.check_integrity() == ()
    assert node.disk.check_integrity() == ()
    node.tier.limit_cache(0)
    assert (node.tier.used_bytes, list((node.tier.directory / OBJECTS).iterdir())) == (0, [])
    node.tier.close()
    node.disk.close()


@contextmanager
def freeing_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let nothing of an object be freed before the block ends; gives what is set as it begins."""
    began, go_on = threading.Event(), threading.Event()
    unlink, free_range = Path.unlink, filesystem.free_range

    def held_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name == OBJECTS:
            began.set()
            go_on.wait(HANG_S)
        unlink(path, missing_ok=missing_ok)

    def held_free(path: Path, byte_range: tuple[int, int]) -> None:
        began.set()
        go_on.wait(HANG_S)
        free_range(path, byte_range)

    monkeypatch.setattr(Path, "unlink", held_unlink)
    monkeypatch.setattr("paraserve_backend.weights.tiers.memory.free_range", held_free)
    try:
        yield began
    finally:
        go_on.set()


@pytest.mark.parametrize("cache_bytes", [0, 40_000], ids=["all of it", "a part of it"])
@pytest.mark.parametrize("by", ["release", "limit"])
def test_nobody_waits_while_gigabytes_are_freed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, cache_bytes: int, by: str
) -> None:
    tier = Tier.open(tmp_path / "tier", cache_bytes=cache_bytes if by == "release" else 1 << 30)
    going = tier.begin(make_plan(model, fetch_id="going"))
    land(going, model)
    going.finish()
    if by == "limit":
        tier.release("going")
    with ThreadPoolExecutor(1) as pool, freeing_held(monkeypatch) as began:
        freeing = pool.submit(
            (lambda: tier.release("going"))
            if by == "release"
            else (lambda: tier.limit_cache(cache_bytes))
        )
        try:
            assert began.wait(HANG_S)
            # Were any of these to wait, the test would hang: the freeing goes on only afterwards.
            tier_messages(tier, None, Sources())
            assert tier.used_bytes <= make_plan(model).total_bytes * 2
            assert tier.fetches() == ()
            name = next(iter(going.object_names))
            tier.holdings([name])
            tier.claim(name, (0, 1))
        finally:
            assert not freeing.done()
    freeing.result()


@pytest.mark.parametrize("what", ["objects", "cache", "fetches"])
def test_files_that_somebody_else_removes_end_nothing_but_what_needs_them(
    tmp_path: Path, model: Path, what: str
) -> None:
    tier = Tier.open(tmp_path / "tier", cache_bytes=1 << 30)
    disk = DiskTier.open(tmp_path / "disk", disk_bytes=1 << 30)
    for number in (1, 2):
        started = tier.begin(make_plan(model, fetch_id=f"f.{number}", layers=(number, number + 1)))
        land(started, model)
        started.finish()
    tier.release("f.1")
    for path in (tier.directory / what).rglob("*"):
        if not path.is_dir():
            path.unlink()
    tier_messages(tier, disk, Sources())
    upkeep = DiskUpkeep(tier, disk)
    while upkeep.write_next():
        pass
    for found in tier.contents(with_files=True):
        with suppress(NotFound), tier.reading(found.name, found.landed[0]):
            pass
    tier.release("f.2")
    # What is wanted next is read from the store: a new file of holes is never taken for weights.
    plan = make_plan(model, fetch_id="f.3")
    again = tier.begin(plan)
    missing = [again.parts[number] for number in again.missing_parts()]
    assert what != "objects" or sum(part.size_bytes for part in missing) == plan.total_bytes
    land(again, model)
    again.finish()
    reader = TierReader.open(tier.directory, "f.3")
    for tensor in plan.tensors:
        assert bytes(reader.view(tensor.name)) == tensor_bytes(model, tensor)
    tier.release("f.3")
    tier.limit_cache(0)
    tier.close()
    disk.close()


def test_a_replica_whose_bytes_somebody_removed_is_not_mixed_with_a_new_one(
    tmp_path: Path, model: Path
) -> None:
    tier = Tier.open(tmp_path / "tier")
    first = tier.begin(make_plan(model, fetch_id="f.1"))
    land(first, model)
    first.finish()
    for path in (tier.directory / OBJECTS).iterdir():
        path.unlink()
    with pytest.raises(Unavailable, match="has vanished from the host-memory tier"):
        tier.begin(make_plan(model, fetch_id="f.2"))
    tier.release("f.1")
    land(tier.begin(make_plan(model, fetch_id="f.2")), model)
    tier.close()
