from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from paraserve_backend.agent.disk_upkeep import DiskUpkeep, Upkeep
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.disk_format import EXTENT_BYTES
from paraserve_backend.weights.tiers.memory import Tier
from tests.support.checkpoints import land, make_plan, write_checkpoint


class Node:
    """A node that has a model in memory, and a clock that only the test moves."""

    def __init__(self, folder: Path) -> None:
        self.now_s = 0.0
        self.is_fetching = False
        self.tier = Tier.open(folder / "tier")
        self.disk = DiskTier.open(folder / "disk", disk_bytes=1 << 30)
        writer = self.tier.begin(make_plan(write_checkpoint(folder / "m", shards=2)))
        land(writer, folder / "m")
        self.upkeep = Upkeep(
            DiskUpkeep(self.tier, self.disk), lambda: self.is_fetching, now=lambda: self.now_s
        )


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.tier.close()
    node.disk.close()


async def test_nothing_is_written_while_a_fetch_runs_or_a_start_comes_up(node: Node) -> None:
    node.now_s, node.is_fetching = 100.0, True
    await node.upkeep.step()
    node.is_fetching = False
    node.now_s += 4.9
    await node.upkeep.step()
    assert node.disk.extents() == ()
    node.now_s += 0.2
    await node.upkeep.step()
    assert len(node.disk.extents()) == 1


async def test_it_writes_no_faster_than_it_may_and_rests_when_all_is_there(node: Node) -> None:
    node.now_s = 100.0
    pauses = [await node.upkeep.step() for _ in range(5)]
    assert len(node.disk.extents()) == 4  # two shards and two small files
    assert pauses == [EXTENT_BYTES / 200e6] * 3 + [2.0] * 2


async def test_when_all_is_there_it_looks_for_damage(node: Node) -> None:
    node.now_s = 100.0
    for _ in range(4):
        await node.upkeep.step()
    damaged = node.disk.extents()[-1]
    damaged.path(node.disk.directory).write_bytes(b"x" * damaged.extent.size_bytes)
    await node.upkeep.step()
    for _ in node.disk.extents():
        await node.upkeep.step()
    # It was dropped, and written once more.
    assert damaged.extent in [held.extent for held in node.disk.extents()]
    assert damaged.path(node.disk.directory).read_bytes()[:1] != b"x"
