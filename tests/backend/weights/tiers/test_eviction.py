"""What stays in a tier when its fetch is released."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.byte_ranges import ByteRange, merge, subtract
from paraserve_backend.weights.fetching.fetch import FetchReport, fetch
from paraserve_backend.weights.sources.base import FOLDERS, StoredObject
from paraserve_backend.weights.sources.open import open_source
from paraserve_backend.weights.tiers.eviction import CachedObject
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.reader import TierReader
from tests.support.checkpoints import (
    land,
    make_plan,
    tensor_bytes,
    write_checkpoint,
)
from tests.support.limits import HANG_S

PART_BYTES = 50_000
AMPLE_BYTES = 1 << 30


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A model of 3.3 MB in two shards."""
    return write_checkpoint(tmp_path / "wide", width=4096, shards=2)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Tier]:
    tier = Tier.open(tmp_path / "tier", cache_bytes=AMPLE_BYTES)
    yield tier
    assert tier.check_integrity() == ()
    tier.close()


def use(tier: Tier, model: Path, fetch_id: str, layers: tuple[int, int] | None = None) -> int:
    """Fetch and release; returns how many bytes were missing before."""
    writer = tier.begin(make_plan(model, fetch_id=fetch_id, layers=layers), part_bytes=PART_BYTES)
    missing_bytes = sum(writer.parts[part].size_bytes for part in writer.missing_parts())
    missing_bytes += sum(stored.size_bytes for stored in writer.missing_files())
    land(writer, model)
    writer.finish()
    assert_right(tier, fetch_id, model)
    tier.release(fetch_id)
    return missing_bytes


def assert_right(tier: Tier, fetch_id: str, folder: Path) -> None:
    reader = TierReader.open(tier.directory, fetch_id)
    for tensor in reader.plan.tensors:
        assert bytes(reader.view(tensor.name)) == tensor_bytes(folder, tensor)
    for stored in reader.plan.files:
        assert reader.read_file(stored.key, timeout_s=0) == (folder / stored.key).read_bytes()


def run(tier: Tier, model: Path, fetch_id: str) -> FetchReport:
    plan, source = make_plan(model, fetch_id=fetch_id), open_source(str(model))
    return fetch(tier.begin(plan), source, tier, timeout_s=HANG_S, cancel=threading.Event())


def test_a_second_fetch_of_the_same_version_needs_nothing(tier: Tier, wide: Path) -> None:
    plan = make_plan(wide)
    assert use(tier, wide, "first") > plan.total_bytes
    assert use(tier, wide, "second") == 0
    report = run(tier, wide, "third")
    assert (report.store_bytes, report.peer_bytes) == (0, 0)
    assert report.reused_bytes == plan.total_bytes


def test_a_wider_fetch_needs_only_what_is_missing(tier: Tier, wide: Path) -> None:
    use(tier, wide, "half", layers=(0, 2))
    half_bytes = make_plan(wide, layers=(0, 2)).total_bytes
    rest_bytes = make_plan(wide).total_bytes - half_bytes
    # Parts that lie only partly in what is there are fetched whole.
    assert rest_bytes <= use(tier, wide, "whole") < rest_bytes + 4 * PART_BYTES


def test_another_version_uses_none_of_the_old_bytes(tier: Tier, wide: Path) -> None:
    use(tier, wide, "old")
    write_checkpoint(wide, width=4096, shards=2, num_layers=3)  # other bytes, other times
    assert use(tier, wide, "new") > make_plan(wide).total_bytes


@pytest.mark.parametrize("cache_bytes", [0, 4096, 100_000, 1_000_000])
def test_the_cache_keeps_within_its_limit_also_if_that_is_less_than_a_shard(
    tier: Tier, wide: Path, cache_bytes: int
) -> None:
    use(tier, wide, "first")
    tier.limit_cache(cache_bytes)
    assert tier.used_bytes <= cache_bytes
    assert tier.check_integrity() == ()
    use(tier, wide, "second")
    assert tier.used_bytes <= cache_bytes


@pytest.fixture
def huge(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory that gives 2 MiB at once."""
    folder = tmp_path / "huge"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a file system")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "huge=always", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_where_pages_are_huge_the_tier_takes_more_than_it_holds(huge: Path, wide: Path) -> None:
    tier = Tier.open(huge / "tier", cache_bytes=AMPLE_BYTES)
    use(tier, wide, "half", layers=(0, 2))
    assert tier.used_bytes > sum(found.landed_bytes for found in tier.contents())
    assert tier.check_integrity() == ()
    use(tier, wide, "whole")
    tier.limit_cache(0)
    assert (tier.used_bytes, tier.check_integrity()) == (0, ())
    tier.close()


def test_what_was_used_last_goes_last(tier: Tier, tmp_path: Path) -> None:
    old, new = (write_checkpoint(tmp_path / name, width=4096) for name in ("old", "new"))
    use(tier, new, "new.0")
    use(tier, old, "old.0")
    use(tier, new, "new.1")
    tier.limit_cache(tier.used_bytes // 2 + 8192)
    assert use(tier, new, "new.2") == 0
    assert use(tier, old, "old.1") > 0


def test_bytes_in_use_are_never_evicted(tier: Tier, wide: Path) -> None:
    use(tier, wide, "gone")
    kept = tier.begin(make_plan(wide, fetch_id="kept", layers=(1, 3)), part_bytes=PART_BYTES)
    land(kept, wide)  # the parts that lay only partly in what was there
    kept.finish()
    tier.limit_cache(0)
    assert_right(tier, "kept", wide)
    assert tier.used_bytes < kept.plan.total_bytes + 8 * 4096


def test_bytes_that_are_read_are_not_evicted_before_the_read_has_ended(
    tier: Tier, wide: Path
) -> None:
    use(tier, wide, "gone")
    found = next(it for it in tier.contents() if it.stored.key.endswith(".safetensors"))
    name = found.name
    start, end = found.landed[0]
    expected = (wide / found.stored.key).read_bytes()[start:end]
    with tier.reading(name, (start, end)) as (fd, _):
        tier.limit_cache(0)
        assert os.pread(fd, end - start, start) == expected
    assert tier.used_bytes == 0


def test_fetches_of_one_object_at_once_bring_its_bytes_once(tier: Tier, wide: Path) -> None:
    reports: list[FetchReport] = []
    threads = [
        threading.Thread(
            target=lambda number=number: reports.append(run(tier, wide, f"f.{number}"))
        )
        for number in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plan = make_plan(wide)
    file_bytes = sum(stored.size_bytes for stored in plan.files)
    assert sum(report.store_bytes for report in reports) == plan.total_bytes + file_bytes
    for number in range(3):
        assert_right(tier, f"f.{number}", wide)


class TestRestart:
    @pytest.fixture
    def left(self, tmp_path: Path, wide: Path) -> Path:
        """The folder of a tier whose agent is gone and that has all of the model."""
        tier = Tier.open(tmp_path / "left", cache_bytes=AMPLE_BYTES)
        use(tier, wide, "before")
        tier.close()
        return tier.directory

    def test_what_was_cached_is_used_again(self, left: Path, wide: Path) -> None:
        assert self._missing_bytes(left, wide) == 0

    def test_an_object_that_lost_bytes_is_fetched_anew(self, left: Path, wide: Path) -> None:
        largest = max((left / "objects").iterdir(), key=lambda path: path.stat().st_size)
        size_bytes = largest.stat().st_size
        largest.write_bytes(b"")
        with largest.open("r+b") as file:
            file.truncate(size_bytes)
        assert self._missing_bytes(left, wide) > 0

    def test_a_truncated_object_is_fetched_anew(self, left: Path, wide: Path) -> None:
        largest = max((left / "objects").iterdir(), key=lambda path: path.stat().st_size)
        with largest.open("r+b") as file:
            file.truncate(largest.stat().st_size - 1)
        assert self._missing_bytes(left, wide) > 0

    @pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff"])
    def test_an_unreadable_index_costs_its_bytes_only(
        self, left: Path, wide: Path, content: bytes
    ) -> None:
        for path in (left / "cache").iterdir():
            path.write_bytes(content)
        assert self._missing_bytes(left, wide) > make_plan(wide).total_bytes

    def test_a_half_written_part_is_not_trusted(self, tmp_path: Path, wide: Path) -> None:
        before = Tier.open(tmp_path / "left", cache_bytes=AMPLE_BYTES)
        writer = before.begin(make_plan(wide), part_bytes=PART_BYTES)
        land(writer, wide, [0, 1])
        half = writer.parts[2]
        with (tmp_path / "left" / "objects" / writer.name_of(writer.object_of(2))).open(
            "r+b"
        ) as file:
            file.seek(half.start)
            file.write(b"x" * (half.size_bytes // 2))
        landed_bytes = sum(writer.parts[part].size_bytes for part in (0, 1))
        before.close()
        tier = Tier.open(tmp_path / "left", cache_bytes=AMPLE_BYTES)
        tier.release("fetch-1")
        assert tier.check_integrity() == ()
        plan = make_plan(wide)
        file_bytes = sum(stored.size_bytes for stored in plan.files)
        tier.close()
        missing_bytes = self._missing_bytes(tmp_path / "left", wide)
        assert missing_bytes in (
            plan.total_bytes - landed_bytes,
            plan.total_bytes - landed_bytes + file_bytes,
        )

    def test_a_smaller_limit_holds_at_once(self, left: Path) -> None:
        tier = Tier.open(left, cache_bytes=10_000)
        assert tier.used_bytes <= 10_000
        tier.close()

    def _missing_bytes(self, left: Path, model: Path) -> int:
        tier = Tier.open(left, cache_bytes=AMPLE_BYTES)
        try:
            assert tier.check_integrity() == ()
            return use(tier, model, "after")
        finally:
            tier.close()


_SPANS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda it: (min(it), max(it))), max_size=6
).map(merge)


@given(steps=st.lists(st.tuples(st.booleans(), _SPANS), max_size=8))
def test_extents_are_what_was_added_and_not_removed(
    steps: list[tuple[bool, tuple[ByteRange, ...]]],
) -> None:
    stored = StoredObject(key="k", size_bytes=64, version="1")
    found = CachedObject(store=FOLDERS, source_uri="/m", stored=stored, extents=())
    expected: tuple[ByteRange, ...] = ()
    for used, (adds, byte_ranges) in enumerate(steps):
        if adds:
            found, expected = found.with_ranges(byte_ranges, used), merge([*expected, *byte_ranges])
            assert all(
                it.used == used
                for it in found.extents
                if subtract([it.byte_range], byte_ranges) == ()
            )
        else:
            found, expected = found.without_ranges(byte_ranges), subtract(expected, byte_ranges)
        assert found.byte_ranges == expected
        assert CachedObject.from_json(found.to_json()) == found
        assert replace(found).name == found.name
