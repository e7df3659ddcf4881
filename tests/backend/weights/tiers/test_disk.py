"""What leaves a node's memory and is found again on its disk."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.agent.disk_upkeep import DiskUpkeep
from paraserve_backend.byte_ranges import within
from paraserve_backend.errors import AlreadyExists
from paraserve_backend.weights.fetching.fetch import FetchReport, fetch
from paraserve_backend.weights.sources.base import FOLDERS, Connection, StoredObject
from paraserve_backend.weights.sources.digest import digest_of
from paraserve_backend.weights.sources.open import open_source
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.disk_format import EXTENT_BYTES, DiskExtent
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.reader import TierReader
from tests.support.checkpoints import (
    land,
    make_plan,
    tensor_bytes,
    write_checkpoint,
)
from tests.support.limits import HANG_S
from tests.support.mounts import needs_mounts, run_with_mounts
from tests.support.patience import patient_fetches

AMPLE_BYTES = 1 << 30


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A model of 26 MB in two shards: each has whole extents and parts of one."""
    return write_checkpoint(tmp_path / "wide", width=1 << 15, shards=2)


@contextmanager
def opened(
    folder: Path, *, disk_bytes: int = AMPLE_BYTES, cache_bytes: int = AMPLE_BYTES
) -> Iterator[tuple[Tier, DiskTier]]:
    """Give the tiers of one agent, and check them when it is gone."""
    folder.mkdir(exist_ok=True)
    tier = Tier.open(folder / "tier", cache_bytes=cache_bytes)
    disk = DiskTier.open(folder / "disk", disk_bytes=disk_bytes)
    yield tier, disk
    assert tier.check_integrity() == ()
    assert disk.check_integrity() == ()
    assert disk.used_bytes == on_disk_bytes(folder) <= disk_bytes
    tier.close()
    disk.close()


def on_disk_bytes(folder: Path) -> int:
    files = (folder / "disk" / "objects").glob("*/*-*-*")
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files)


def write_all(tier: Tier, disk: DiskTier) -> None:
    upkeep = DiskUpkeep(tier, disk)
    while upkeep.write_next():
        pass


class NoSource:
    """A store that has everything and gives nothing but the one byte that proves a right."""

    uri = "none:"
    store = FOLDERS

    def list(self) -> tuple[StoredObject, ...]:
        raise AssertionError("nothing is to be listed")

    def connect(self) -> Connection:
        return self

    def read_into(self, stored: StoredObject, start: int, view: memoryview) -> None:
        assert len(view) == 1, f"{stored.key} is asked of the store"

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def run(
    tier: Tier,
    disk: DiskTier,
    model: Path,
    *,
    fetch_id: str = "fetch-1",
    store: bool = True,
    layers: tuple[int, int] | None = None,
) -> FetchReport:
    """Fetch, with a link so slow that the disk is never too slow for it, and check every byte."""
    plan = make_plan(model, fetch_id=fetch_id, layers=layers)
    with patient_fetches():
        report = fetch(
            tier.begin(plan),
            open_source(str(model)) if store else NoSource(),
            tier,
            timeout_s=HANG_S,
            cancel=threading.Event(),
            disk=disk,
            link_bytes_per_s=1.0,
        )
    reader = TierReader.open(tier.directory, fetch_id)
    for tensor in plan.tensors:
        assert bytes(reader.view(tensor.name)) == tensor_bytes(model, tensor)
    for stored in plan.files:
        assert reader.read_file(stored.key, timeout_s=0) == (model / stored.key).read_bytes()
    return report


def all_bytes(model: Path) -> int:
    plan = make_plan(model)
    return plan.total_bytes + sum(stored.size_bytes for stored in plan.files)


def put_on_disk(folder: Path, model: Path, layers: tuple[int, int] | None = None) -> None:
    """Leave a folder whose disk tier has a model, and whose memory has nothing."""
    with opened(folder) as (tier, disk):
        run(tier, disk, model, layers=layers)
        write_all(tier, disk)
        tier.limit_cache(0)
        tier.release("fetch-1")
        assert tier.used_bytes == 0


def extents(folder: Path) -> list[Path]:
    return sorted((folder / "disk" / "objects").glob("*/*-*-*"))


def test_what_was_evicted_from_memory_comes_from_disk_also_to_the_next_agent(
    tmp_path: Path, wide: Path
) -> None:
    put_on_disk(tmp_path / "node", wide)
    with opened(tmp_path / "node") as (tier, disk):
        report = run(tier, disk, wide, store=False)
    assert report.disk_bytes == all_bytes(wide)
    assert (report.store_bytes, report.peer_bytes, report.reused_bytes) == (0, 0, 0)


def test_what_is_in_memory_is_not_read_from_disk(tmp_path: Path, wide: Path) -> None:
    with opened(tmp_path / "node") as (tier, disk):
        run(tier, disk, wide)
        write_all(tier, disk)
        tier.release("fetch-1")
        assert run(tier, disk, wide, fetch_id="again", store=False).disk_bytes == 0


def test_another_cut_into_stages_reads_what_is_there_and_fetches_the_rest(
    tmp_path: Path, wide: Path
) -> None:
    put_on_disk(tmp_path / "node", wide, layers=(0, 2))
    with opened(tmp_path / "node") as (tier, disk):
        report = run(tier, disk, wide)
    half_bytes = make_plan(wide, layers=(0, 2)).total_bytes
    assert half_bytes - 4 * EXTENT_BYTES < report.disk_bytes
    assert report.disk_bytes + report.store_bytes == all_bytes(wide)


def test_a_part_of_an_extent_and_one_across_extents_are_read_right(
    tmp_path: Path, wide: Path
) -> None:
    put_on_disk(tmp_path / "node", wide, layers=(0, 2))
    with opened(tmp_path / "node") as (tier, disk):
        run(tier, disk, wide)  # more extents, beside those that are there
        write_all(tier, disk)
        tier.limit_cache(0)
        tier.release("fetch-1")
        assert run(tier, disk, wide, store=False).disk_bytes == all_bytes(wide)
        tier.release("fetch-1")
        run(tier, disk, wide, layers=(1, 2), store=False)


def test_deployments_of_one_object_share_its_extents(tmp_path: Path, wide: Path) -> None:
    with opened(tmp_path / "node") as (tier, disk):
        run(tier, disk, wide, fetch_id="one.1.0")
        write_all(tier, disk)
        used_bytes = disk.used_bytes
        run(tier, disk, wide, fetch_id="other.1.0")
        write_all(tier, disk)
        assert disk.used_bytes == used_bytes


def test_another_version_of_an_object_uses_nothing_of_the_old(tmp_path: Path, wide: Path) -> None:
    put_on_disk(tmp_path / "node", wide)
    write_checkpoint(wide, width=1 << 15, shards=2, num_layers=3)
    with opened(tmp_path / "node") as (tier, disk):
        assert run(tier, disk, wide).disk_bytes == 0


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_a_damaged_extent_is_dropped_and_its_bytes_come_from_elsewhere(
    tmp_path: Path, wide: Path, damage: object
) -> None:
    assert callable(damage)
    put_on_disk(tmp_path / "node", wide)
    with opened(tmp_path / "node") as (tier, disk):
        largest = max(extents(tmp_path / "node"), key=lambda path: path.stat().st_size)
        lost = DiskExtent.parse(largest.name)
        assert lost is not None
        damage(largest)
        report = run(tier, disk, wide)
        assert report.store_bytes == lost.size_bytes
        assert report.disk_bytes == all_bytes(wide) - lost.size_bytes
        assert not largest.exists()
        write_all(tier, disk)  # and it is there again
        assert within(lost.byte_range, disk.byte_ranges(largest.parent.name))


def test_damage_is_found_before_anybody_wants_the_bytes(
    tmp_path: Path, wide: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put_on_disk(tmp_path / "node", wide)
    with opened(tmp_path / "node") as (tier, disk):
        damaged = extents(tmp_path / "node")[1]
        flip_a_bit(damaged)
        assert disk.check_integrity() == ()  # reads no content
        upkeep = DiskUpkeep(tier, disk)
        for _ in disk.extents():
            upkeep.verify_next()
        assert not damaged.exists()
    (warning,) = caplog.messages
    assert str(damaged) in warning


def test_what_is_not_whole_when_an_agent_starts_is_removed(tmp_path: Path, wide: Path) -> None:
    put_on_disk(tmp_path / "node", wide)
    first, second, *_ = extents(tmp_path / "node")
    truncate(first)
    second.rename(second.with_name(f".{second.name}"))  # an agent that died while it wrote
    (first.parent / "strange").write_bytes(b"x")
    (tmp_path / "node" / "disk" / "objects" / "empty").mkdir()
    with opened(tmp_path / "node") as (tier, disk):
        assert not first.exists()
        report = run(tier, disk, wide)
        assert 0 < report.store_bytes <= 2 * EXTENT_BYTES


@pytest.mark.parametrize("disk_bytes", [0, 4096, EXTENT_BYTES - 1, 2 * EXTENT_BYTES])
def test_the_disk_keeps_within_its_limit_also_if_that_is_less_than_a_shard(
    tmp_path: Path, wide: Path, disk_bytes: int
) -> None:
    with opened(tmp_path / "node", disk_bytes=disk_bytes) as (tier, disk):
        run(tier, disk, wide)
        write_all(tier, disk)
        tier.limit_cache(0)
        tier.release("fetch-1")
        assert disk.used_bytes <= disk_bytes
        found_bytes = sum(found.landed_bytes for found in disk.contents())
        assert run(tier, disk, wide).disk_bytes <= found_bytes


def test_a_smaller_limit_holds_for_the_next_agent_at_once(tmp_path: Path, wide: Path) -> None:
    put_on_disk(tmp_path / "node", wide)
    with opened(tmp_path / "node", disk_bytes=EXTENT_BYTES) as (_, disk):
        assert 0 < disk.used_bytes <= EXTENT_BYTES


@pytest.mark.parametrize("restart", [False, True])
def test_what_was_used_last_goes_last(tmp_path: Path, restart: bool) -> None:
    old, new, third = (
        write_checkpoint(tmp_path / name, width=4096) for name in ("old", "new", "third")
    )
    room_bytes = 2 * on_disk(tmp_path, third) + 8192
    with opened(tmp_path / "node", disk_bytes=room_bytes, cache_bytes=0) as (tier, disk):
        for name, model in (("new", new), ("old", old), ("new", new)):
            run(tier, disk, model, fetch_id=name)
            write_all(tier, disk)
            tier.release(name)
        if not restart:
            bring_third(tier, disk, third)
            assert kept(disk, new)
            assert not kept(disk, old)
    if restart:
        with opened(tmp_path / "node", disk_bytes=room_bytes, cache_bytes=0) as (tier, disk):
            bring_third(tier, disk, third)
            assert kept(disk, new)
            assert not kept(disk, old)


def on_disk(tmp_path: Path, model: Path) -> int:
    with opened(tmp_path / "measured") as (tier, disk):
        run(tier, disk, model)
        write_all(tier, disk)
        return disk.used_bytes


def bring_third(tier: Tier, disk: DiskTier, model: Path) -> None:
    run(tier, disk, model, fetch_id="third")
    write_all(tier, disk)
    tier.release("third")


def kept(disk: DiskTier, model: Path) -> bool:
    """Whether all of a model's tensors are on disk."""
    plan = make_plan(model)
    on_disk = {(it.source_uri, it.stored.key): it.landed for it in disk.contents()}
    return all(
        within((part.start, part.end), on_disk.get((plan.source_uri, part.object_key), ()))
        for part in plan.ranges
    )


def test_a_disk_smaller_than_the_memory_is_not_written_over_and_over(
    tmp_path: Path, wide: Path
) -> None:
    with opened(tmp_path / "node", disk_bytes=2 * EXTENT_BYTES) as (tier, disk):
        run(tier, disk, wide)
        write_all(tier, disk)
        before = disk.extents()
        write_all(tier, disk)
        assert disk.extents() == before


def test_a_disk_has_one_agent_at_a_time(tmp_path: Path) -> None:
    first = DiskTier.open(tmp_path, disk_bytes=1)
    with pytest.raises(AlreadyExists, match="another agent"):
        DiskTier.open(tmp_path, disk_bytes=1)
    first.close()
    DiskTier.open(tmp_path, disk_bytes=1).close()


def test_files_that_are_not_as_the_index_says_are_reported(tmp_path: Path, wide: Path) -> None:
    put_on_disk(tmp_path / "node", wide)
    disk = DiskTier.open(tmp_path / "node" / "disk", disk_bytes=AMPLE_BYTES)
    missing, short, *_ = extents(tmp_path / "node")
    missing.unlink()
    truncate(short)
    (short.parent / "strange").write_bytes(b"x")
    problems = "\n".join(disk.check_integrity())
    assert f"{missing} is missing" in problems
    assert f"{short} has" in problems
    assert "strange is no whole extent that is known" in problems
    disk.close()


WRITE_TO_A_SMALL_DISK = """
import logging, pathlib, subprocess, sys
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.agent.disk_upkeep import DiskUpkeep
from paraserve_backend.weights.tiers.memory import Tier
from tests.support.checkpoints import land, make_plan
logging.basicConfig(stream=sys.stdout, format="%(message)s")
small, model = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "none", str(small)], check=True)
now = [0.0]
disk = DiskTier.open(small, disk_bytes=1 << 40, now=lambda: now[0])
tier = Tier.open(small.parent / "tier", cache_bytes=1 << 30)
fetch = tier.begin(make_plan(model))
land(fetch, model)
upkeep = DiskUpkeep(tier, disk)
for _ in range(50):
    upkeep.write_next()
print(disk.is_resting, disk.check_integrity(), [*small.glob("objects/*/.*")])
now[0] = 601.0
print(disk.is_resting)
"""


@needs_mounts
def test_a_full_disk_is_warned_of_once_and_then_left_alone_for_a_while(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "wide", width=4096)
    (small := tmp_path / "small").mkdir()
    warning, state, later = run_with_mounts(WRITE_TO_A_SMALL_DISK, small, model).splitlines()
    assert warning.startswith("disk tier takes nothing for 600 s")
    assert "No space left on device" in warning
    assert state == "True () []"
    assert later == "False"


def test_a_name_that_is_no_extent_is_not_taken_for_one() -> None:
    extent = DiskExtent(start=5, end=9, checksum=0xABC)
    assert DiskExtent.parse(extent.file_name) == extent
    too_large = replace(extent, end=6 + EXTENT_BYTES)
    for name in ("5-9", "9-5-00000abc", "5-9-00000ABC", "-5-9-00000abc", too_large.file_name):
        assert DiskExtent.parse(name) is None


@given(size_bytes=st.integers(1, 3 * 4096 + 100), seed=st.integers(0, 99), data=st.data())
def test_a_checksum_sees_changed_bytes_and_pages_that_changed_places(
    size_bytes: int, seed: int, data: st.DataObject
) -> None:
    content = bytearray(random.Random(seed).randbytes(size_bytes))
    before = digest_of(memoryview(content))
    assert digest_of(memoryview(bytes(content))) == before
    start = data.draw(st.integers(0, size_bytes - 1))
    end = data.draw(st.integers(start + 1, size_bytes))
    zeroed = bytearray(content)
    zeroed[start:end] = bytes(end - start)
    assert (digest_of(memoryview(zeroed)) == before) == (zeroed == content)
    flipped = bytearray(content)
    flipped[start] ^= 1 << data.draw(st.integers(0, 7))
    assert digest_of(memoryview(flipped)) != before
    if size_bytes >= 2 * 4096:
        swapped = content[4096:8192] + content[:4096] + content[8192:]
        assert digest_of(memoryview(swapped)) != before


def test_reading_what_another_thread_has_dropped_is_damage_and_no_error(
    tmp_path: Path, wide: Path
) -> None:
    put_on_disk(tmp_path / "node", wide)
    with opened(tmp_path / "node") as (tier, disk):
        for held in disk.extents():
            held.path(disk.directory).unlink()
        assert run(tier, disk, wide).store_bytes == all_bytes(wide)
        assert disk.extents() == ()


def test_upkeep_skips_what_has_left_the_memory(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", width=4096, shards=2)
    with opened(tmp_path / "node") as (tier, disk):
        land(tier.begin(make_plan(model)), model)
        tier.fetches()[0].finish()
        upkeep = DiskUpkeep(tier, disk)
        assert upkeep.write_next()
        tier.limit_cache(0)
        tier.release("fetch-1")
        while upkeep.write_next():
            pass
        assert len(disk.extents()) == 1


@pytest.fixture(autouse=True)
def _warnings_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
