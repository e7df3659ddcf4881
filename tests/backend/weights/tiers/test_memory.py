from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from paraserve_backend.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidCheckpoint,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from paraserve_backend.weights.tiers.layout import FetchStatus
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

PART_BYTES = 700  # no multiple of anything: parts end inside tensors and inside pages


def assert_tensors_are(reader: TierReader, folder: Path) -> None:
    for tensor in reader.plan.tensors:
        assert reader.has_landed(tensor.name)
        assert bytes(reader.view(tensor.name)) == tensor_bytes(folder, tensor)


def test_a_finished_fetch_reads_back_as_it_was_written(tier: Tier, model: Path) -> None:
    fetch = tier.begin(make_plan(model), part_bytes=PART_BYTES)
    reader = TierReader.open(tier.directory, "fetch-1")
    land(fetch, model)
    fetch.finish()
    assert_tensors_are(reader, model)
    assert reader.read_file("config.json", timeout_s=0) == (model / "config.json").read_bytes()


@pytest.mark.parametrize("seed", range(3))
def test_a_tensor_has_landed_once_all_its_parts_have_whatever_the_order(
    tier: Tier, model: Path, seed: int
) -> None:
    fetch = tier.begin(make_plan(model), part_bytes=PART_BYTES)
    reader = TierReader.open(tier.directory, "fetch-1")
    order = list(range(len(fetch.parts)))
    random.Random(seed).shuffle(order)
    for number in order:
        land(fetch, model, [number])
        missing = set(fetch.missing_parts())
        for tensor in fetch.plan.tensors:
            overlapping = {
                part
                for part, it in enumerate(fetch.parts)
                if it.object_key == tensor.object_key
                and it.start < tensor.end
                and tensor.start < it.end
            }
            assert reader.has_landed(tensor.name) == (not overlapping & missing)


def test_names_are_yielded_as_they_land(tier: Tier, model: Path) -> None:
    fetch = tier.begin(make_plan(model), part_bytes=PART_BYTES)
    reader = TierReader.open(tier.directory, "fetch-1")
    names = [tensor.name for tensor in fetch.plan.tensors]
    numbers = list(reversed(range(len(fetch.parts))))
    order: list[str] = []
    landing = reader.iter_landed(names, timeout_s=HANG_S)
    while numbers:
        land(fetch, model, [numbers.pop(0)])
        while len(order) < sum(map(reader.has_landed, names)):
            order.append(next(landing))
    assert sorted(order) == sorted(names)
    assert order[0] == names[-1]
    assert next(landing, None) is None


READ_IN_ANOTHER_PROCESS = """
import hashlib, pathlib, sys
from paraserve_backend.weights.tiers.reader import TierReader
reader = TierReader.open(pathlib.Path(sys.argv[1]), "fetch-1")
print("open", flush=True)
for tensor in reader.plan.tensors:
    reader.wait_for(tensor.name, timeout_s=float(sys.argv[2]))
    print(hashlib.sha256(reader.view(tensor.name)).hexdigest(), flush=True)
"""


def test_another_process_reads_tensors_while_the_fetch_still_runs(tier: Tier, model: Path) -> None:
    plan = make_plan(model)
    fetch = tier.begin(plan, part_bytes=PART_BYTES)
    command = [sys.executable, "-c", READ_IN_ANOTHER_PROCESS, str(tier.directory), str(HANG_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "open\n"
        for number in range(len(fetch.parts)):
            land(fetch, model, [number])
        digests = reader.stdout.read().split()
    assert fetch.status is FetchStatus.RUNNING
    expected = [hashlib.sha256(tensor_bytes(model, tensor)) for tensor in plan.tensors]
    assert digests == [digest.hexdigest() for digest in expected]


def test_writing_to_a_view_changes_nothing_for_other_readers(tier: Tier, model: Path) -> None:
    fetch = tier.begin(make_plan(model))
    land(fetch, model)
    name = fetch.plan.tensors[0].name
    view = TierReader.open(tier.directory, "fetch-1").view(name)
    view[0] ^= 0xFF
    assert_tensors_are(TierReader.open(tier.directory, "fetch-1"), model)


def test_a_reader_raises_what_made_the_fetch_fail(tier: Tier, model: Path) -> None:
    fetch = tier.begin(make_plan(model), part_bytes=PART_BYTES)
    reader = TierReader.open(tier.directory, "fetch-1")
    land(fetch, model, range(7))
    fetch.fail(InvalidCheckpoint("model.safetensors has changed"))
    reader.wait_for(fetch.plan.tensors[0].name, timeout_s=0)
    for name in (fetch.plan.tensors[-1].name, fetch.plan.tensors[-2].name):
        with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors has changed"):
            reader.wait_for(name, timeout_s=HANG_S)
        with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors has changed"):
            list(reader.iter_landed([name], timeout_s=HANG_S))


def test_a_long_error_reaches_readers_cut(tier: Tier, model: Path) -> None:
    tier.begin(make_plan(model)).fail(InvalidCheckpoint("ä" * 9999))
    with pytest.raises(InvalidCheckpoint, match=r"^ä{1000,}$"):
        TierReader.open(tier.directory, "fetch-1").wait_for("lm_head.weight", timeout_s=HANG_S)


def test_a_reader_gives_up_after_its_time_limit(tier: Tier, model: Path) -> None:
    tier.begin(make_plan(model))
    reader = TierReader.open(tier.directory, "fetch-1")
    with pytest.raises(DeadlineExceeded, match=r"lm_head\.weight"):
        reader.wait_for("lm_head.weight", timeout_s=0.01)


def test_what_is_not_there_is_not_found(tier: Tier, model: Path) -> None:
    with pytest.raises(NotFound, match="fetch-1"):
        TierReader.open(tier.directory, "fetch-1")
    tier.begin(make_plan(model))
    reader = TierReader.open(tier.directory, "fetch-1")
    with pytest.raises(NotFound, match="no tensor x"):
        reader.wait_for("x", timeout_s=0)
    with pytest.raises(NotFound, match="no file x"):
        reader.read_file("x", timeout_s=0)
    with pytest.raises(NotFound, match="no fetch x"):
        tier.release("x")


def test_beginning_again_goes_on_where_the_fetch_stopped(tier: Tier, model: Path) -> None:
    fetch = tier.begin(make_plan(model), part_bytes=PART_BYTES)
    land(fetch, model, [0, 2])
    fetch.fail(Unavailable("store is down"))
    again = tier.begin(make_plan(model))
    assert again.status is FetchStatus.RUNNING
    assert again.missing_parts() == [1, *range(3, len(fetch.parts))]
    assert again.missing_files() == []
    land(again, model)
    assert_tensors_are(TierReader.open(tier.directory, "fetch-1"), model)


def test_a_fetch_id_cannot_stand_for_two_plans(tier: Tier, model: Path) -> None:
    tier.begin(make_plan(model))
    with pytest.raises(AlreadyExists, match="another plan"):
        tier.begin(make_plan(model, layers=(0, 1)))


def test_bytes_of_another_fetch_count_as_landed(tier: Tier, model: Path) -> None:
    first = tier.begin(make_plan(model, layers=(0, 3)), part_bytes=PART_BYTES)
    land(first, model)
    whole = tier.begin(make_plan(model, fetch_id="whole"), part_bytes=PART_BYTES)
    missing_bytes = sum(whole.parts[part].size_bytes for part in whole.missing_parts())
    rest_bytes = whole.plan.total_bytes - first.plan.total_bytes
    # A part that lies only partly in what has landed is fetched again.
    assert rest_bytes <= missing_bytes < rest_bytes + 3 * PART_BYTES
    land(whole, model)
    assert_tensors_are(TierReader.open(tier.directory, "whole"), model)
    assert_tensors_are(TierReader.open(tier.directory, "fetch-1"), model)


def test_another_version_of_an_object_shares_nothing(tier: Tier, model: Path) -> None:
    plan = make_plan(model)
    land(tier.begin(plan), model)
    objects = tuple(replace(stored, version="other") for stored in plan.objects)
    other = tier.begin(replace(plan, fetch_id="other", objects=objects))
    assert len(other.missing_parts()) == len(other.parts)


def test_contents_tell_which_bytes_of_which_object_are_there(tier: Tier, model: Path) -> None:
    fetch = tier.begin(make_plan(model), part_bytes=PART_BYTES)
    land(fetch, model, [0])
    part = fetch.parts[0]
    landed = {found.stored.key: found.landed for found in tier.contents()}
    expected = {stored.key: () for stored in fetch.plan.objects}
    assert landed == expected | {part.object_key: ((part.start, part.end),)}
    land(fetch, model)
    assert sum(found.landed_bytes for found in tier.contents()) == fetch.plan.total_bytes


class TestRelease:
    @pytest.fixture
    def wide(self, tmp_path: Path) -> Path:
        """A model of one file whose layers have 64 to 76 pages each."""
        return write_checkpoint(tmp_path / "wide", width=4096)

    def test_the_last_fetch_of_an_object_frees_all_of_it(self, tier: Tier, wide: Path) -> None:
        fetch = tier.begin(make_plan(wide))
        land(fetch, wide)
        fetch.finish()
        assert tier.used_bytes >= fetch.plan.total_bytes
        tier.release("fetch-1")
        assert tier.used_bytes == 0
        assert tier.contents() == ()
        with pytest.raises(NotFound):
            TierReader.open(tier.directory, "fetch-1")

    def test_bytes_that_another_fetch_needs_stay(self, tier: Tier, wide: Path) -> None:
        kept = tier.begin(make_plan(wide, fetch_id="kept", layers=(1, 3)))
        land(kept, wide)
        dropped = tier.begin(make_plan(wide, fetch_id="dropped"))
        land(dropped, wide)
        dropped.finish()
        tier.release("dropped")
        assert_tensors_are(TierReader.open(tier.directory, "kept"), wide)
        # Pages at the ends of what is freed are shared with what stays.
        assert tier.used_bytes <= kept.plan.total_bytes + 4 * 4096

    def test_bytes_are_fetched_again_after_their_release(self, tier: Tier, wide: Path) -> None:
        land(tier.begin(make_plan(wide, fetch_id="kept", layers=(1, 3))), wide)
        dropped = tier.begin(make_plan(wide))
        land(dropped, wide)
        dropped.finish()
        tier.release("fetch-1")
        again = tier.begin(make_plan(wide))
        assert again.missing_parts()
        land(again, wide)
        assert_tensors_are(TierReader.open(tier.directory, "fetch-1"), wide)

    def test_a_running_fetch_is_not_released(self, tier: Tier, wide: Path) -> None:
        tier.begin(make_plan(wide))
        with pytest.raises(InvalidRequest, match="cancel it first"):
            tier.release("fetch-1")

    def test_views_of_a_deleted_object_stay_readable(self, tier: Tier, wide: Path) -> None:
        fetch = tier.begin(make_plan(wide))
        land(fetch, wide)
        fetch.finish()
        reader = TierReader.open(tier.directory, "fetch-1")
        views = {tensor: reader.view(tensor.name) for tensor in fetch.plan.tensors}
        tier.release("fetch-1")
        assert all(bytes(view) == tensor_bytes(wide, it) for it, view in views.items())


class TestRestart:
    def test_what_had_landed_is_still_there(self, tmp_path: Path, model: Path) -> None:
        before = Tier.open(tmp_path / "tier")
        for fetch_id, parts in (("done", None), ("half", [0])):
            fetch = before.begin(make_plan(model, fetch_id=fetch_id), part_bytes=PART_BYTES)
            land(fetch, model, parts)
            if parts is None:
                fetch.finish()
        contents = before.contents()
        before.close()
        tier = Tier.open(tmp_path / "tier")
        assert set(tier.contents()) == set(contents)
        assert {it.plan.fetch_id: it.status for it in tier.fetches()} == {
            "done": FetchStatus.DONE,
            "half": FetchStatus.FAILED,
        }
        tier.close()

    def test_readers_of_an_interrupted_fetch_are_told(self, tmp_path: Path, model: Path) -> None:
        before = Tier.open(tmp_path / "tier")
        before.begin(make_plan(model))
        reader = TierReader.open(tmp_path / "tier", "fetch-1")
        before.close()
        tier = Tier.open(tmp_path / "tier")
        with pytest.raises(Unavailable, match="interrupted"):
            reader.wait_for("lm_head.weight", timeout_s=HANG_S)
        tier.close()

    def test_leftovers_of_an_interrupted_change_are_removed(
        self, tmp_path: Path, model: Path
    ) -> None:
        before = Tier.open(tmp_path / "tier")
        land(before.begin(make_plan(model)), model)
        before.close()
        (tmp_path / "tier" / "fetches" / "fetch-1" / "manifest.json").unlink()
        (tmp_path / "tier" / "fetches" / "half-made" / "files").mkdir(parents=True)
        tier = Tier.open(tmp_path / "tier")
        assert (tier.fetches(), tier.used_bytes, tier.check_integrity()) == ((), 0, ())
        assert list((tmp_path / "tier" / "fetches").iterdir()) == []
        tier.close()

    def test_a_tier_has_one_writer_at_a_time(self, tmp_path: Path) -> None:
        first = Tier.open(tmp_path)
        with pytest.raises(AlreadyExists, match="another agent"):
            Tier.open(tmp_path)
        first.close()
        Tier.open(tmp_path).close()


FILL_A_SMALL_TIER = """
import pathlib, subprocess, sys
from paraserve_backend.errors import InsufficientCapacity
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.reader import TierReader
from tests.support.checkpoints import land, make_plan
small, model = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "none", str(small)], check=True)
fetch = Tier.open(small).begin(make_plan(model), part_bytes=100_000)
try:
    land(fetch, model)
except InsufficientCapacity as error:
    fetch.fail(error)
try:
    TierReader.open(small, "fetch-1").wait_for("lm_head.weight", timeout_s=300)
except InsufficientCapacity as error:
    print(error)
"""
CACHE_IN_A_SMALL_TIER = """
import pathlib, subprocess, sys
from paraserve_backend.weights.tiers.memory import Tier
from tests.support.checkpoints import land, make_plan
small, models = pathlib.Path(sys.argv[1]), map(pathlib.Path, sys.argv[2:])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "none", str(small)], check=True)
tier = Tier.open(small, cache_bytes=1 << 30)
for number, model in enumerate(models):
    fetch = tier.begin(make_plan(model, fetch_id=f"fetch-{number}"))
    land(fetch, model)
    fetch.finish()
    tier.release(f"fetch-{number}")
print(tier.check_integrity(), tier.used_bytes > 0)
"""


@needs_mounts
def test_a_full_tier_is_an_error_that_readers_get_too(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "wide", width=4096)
    (small := tmp_path / "small").mkdir()
    said = run_with_mounts(FILL_A_SMALL_TIER, small, model)
    assert said.startswith("no room in the host-memory tier for fetch fetch-1, which needs ")
    assert f"free in {small}; make that file system larger" in said


@needs_mounts
def test_what_is_cached_gives_way_where_memory_is_short(tmp_path: Path) -> None:
    models = [write_checkpoint(tmp_path / f"m{number}", width=512) for number in range(4)]
    (small := tmp_path / "small").mkdir()
    assert run_with_mounts(CACHE_IN_A_SMALL_TIER, small, *models) == "() True\n"


def test_damage_to_the_tier_is_reported(tmp_path: Path, model: Path) -> None:
    tier = Tier.open(tmp_path / "tier")
    land(tier.begin(make_plan(model)), model)
    objects = tmp_path / "tier" / "objects"
    first, second = sorted(objects.iterdir())
    size_bytes = first.stat().st_size
    first.write_bytes(b"")
    with first.open("r+b") as file:
        file.truncate(size_bytes)
    second.unlink()
    (objects / "stray").write_bytes(b"x")
    problems = "\n".join(sorted(tier.check_integrity()))
    assert "has no bytes at" in problems
    assert "is missing" in problems
    assert "stray belongs to no fetch" in problems
    tier.close()


def test_waiting_takes_little_processor_time(tier: Tier, model: Path) -> None:
    tier.begin(make_plan(model))
    reader = TierReader.open(tier.directory, "fetch-1")
    began_s, used_s = time.monotonic(), time.process_time()
    with pytest.raises(DeadlineExceeded):
        list(reader.iter_landed([it.name for it in reader.plan.tensors], timeout_s=0.3))
    assert time.process_time() - used_s < 0.5 * (time.monotonic() - began_s)
