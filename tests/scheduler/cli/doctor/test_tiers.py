from __future__ import annotations

import json
from pathlib import Path

import pytest

from paraserve_backend.agent.disk_upkeep import DiskUpkeep
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_scheduler.cli.doctor.machine import State
from paraserve_scheduler.cli.doctor.tiers import examine_tiers
from paraserve_scheduler.cli.main import main
from tests.support.checkpoints import land, make_plan, write_checkpoint


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """The folders of an agent that runs and has one model in use and one cached."""
    (tmp_path / "run").mkdir()
    tier = Tier.open(tmp_path / "run" / "tier", cache_bytes=1 << 30)
    disk = DiskTier.open(tmp_path / "disk", disk_bytes=1 << 30)
    for name in ("cached", "used"):
        writer = tier.begin(make_plan(write_checkpoint(tmp_path / name, width=4096), fetch_id=name))
        land(writer, tmp_path / name)
        writer.finish()
    tier.release("cached")
    upkeep = DiskUpkeep(tier, disk)
    while upkeep.write_next():
        pass
    return tmp_path


def objects(tier: Path) -> list[Path]:
    return sorted((tier / "objects").iterdir())


def test_tiers_in_use_are_told_with_their_size_and_nothing_is_wrong(node: Path) -> None:
    memory, disk = examine_tiers(node / "run", node / "disk")
    assert (memory.state, disk.state) == (State.OK, State.OK)
    assert memory.detail.startswith("4 objects, 6.")
    assert disk.detail.startswith("6 objects, 6.")


def test_damage_to_the_memory_tier_is_told(node: Path) -> None:
    first, second, *_ = objects(node / "run" / "tier")
    first.unlink()
    with second.open("r+b") as file:
        file.truncate(second.stat().st_size + 1)
    (first.parent / "stray").write_bytes(b"x")
    _, *damage = examine_tiers(node / "run", None)
    said = sorted(finding.detail for finding in damage)
    assert {finding.state for finding in damage} == {State.DAMAGED}
    assert any(sentence.endswith("is missing") for sentence in said)
    assert "object file stray belongs to no fetch" in said
    assert len(damage) == 3


def test_damage_on_disk_is_told(node: Path) -> None:
    extent = next((node / "disk").glob("objects/*/*-*-*"))
    extent.write_bytes(b"x" * extent.stat().st_size)
    strange = extent.with_name("strange")
    strange.write_bytes(b"x")
    _, *damage = examine_tiers(None, node / "disk")
    assert [finding.detail for finding in damage] == [
        f"{strange} is no whole extent",
        f"{extent} has other bytes than were written",
    ]


def test_a_folder_without_a_tier_is_named(tmp_path: Path) -> None:
    for finding in examine_tiers(tmp_path, tmp_path):
        assert finding.state is State.MISSING
        assert str(tmp_path) in finding.detail
        assert "settings" in finding.remedy


def test_the_command_ends_with_1_where_something_is_damaged(
    node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["doctor", "--json", "--run-dir", str(node / "run"), "--disk-dir", str(node / "disk")]
    assert main(command) == 0
    capsys.readouterr()
    objects(node / "run" / "tier")[0].unlink()
    assert main(command) == 1
    states = [entry["state"] for entry in json.loads(capsys.readouterr().out)]
    assert states == ["ok", "damaged", "ok"]
