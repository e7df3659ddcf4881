"""Bytes in a node's memory, on its disk and of its peers are those of one store and one reader."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from paraserve_backend.agent.disk_upkeep import DiskUpkeep
from paraserve_backend.agent.fetches import Fetches, FetchLimits, FetchRequest
from paraserve_backend.agent.peer_server import PeerServer, RateLimit
from paraserve_backend.errors import AccessDenied
from paraserve_backend.weights.sources.base import FOLDERS, StoreIdentity
from paraserve_backend.weights.sources.open import Sources, open_source
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.reader import TierReader
from tests.support.checkpoints import make_plan, write_checkpoint
from tests.support.limits import HANG_S
from tests.support.stores import BUCKET, ScriptedStore, refuse, serve

URI = f"s3://{BUCKET}/tiny"
POISON = b"\xee" * 64
pytestmark = pytest.mark.usefixtures("aws_environment")


@dataclass(frozen=True, slots=True, kw_only=True)
class Twins:
    """Two stores with the same keys, sizes and ETags, whose last weights differ."""

    mine: ScriptedStore
    mine_url: str
    last_bytes: bytes
    other_url: str


@pytest.fixture
def twins(tmp_path: Path) -> Iterator[Twins]:
    folder = write_checkpoint(tmp_path / "model")
    mine = {f"tiny/{path.name}": path.read_bytes() for path in folder.iterdir()}
    weights = mine["tiny/model.safetensors"]
    other = mine | {"tiny/model.safetensors": weights[:-64] + POISON}
    store = ScriptedStore(mine)
    with ExitStack() as stack:
        yield Twins(
            mine=store,
            mine_url=stack.enter_context(serve(store)),
            last_bytes=weights[-64:],
            other_url=stack.enter_context(serve(ScriptedStore(other))),
        )


class Node:
    """An agent's fetches over its tier; made on the event loop."""

    def __init__(self, folder: Path, disk: DiskTier | None = None) -> None:
        self.tier = Tier.open(folder, cache_bytes=1 << 30)
        limits = FetchLimits(threads=1, tier_bytes=1 << 30, memory_bytes=1 << 30)
        self.fetches = Fetches(self.tier, limits, disk=disk)

    async def use(self, wanted: FetchRequest) -> tuple[int, bytes]:
        """Fetch and release; returns how many bytes were brought, and the last ones of all."""
        fetched = await (await self.fetches.start(wanted, HANG_S)).wait()
        reader = TierReader.open(self.tier.directory, wanted.plan.fetch_id)
        last = max(wanted.plan.tensors, key=lambda tensor: tensor.end)
        content = bytes(reader.view(last.name))[-64:]
        await self.fetches.release(wanted.plan.fetch_id)
        return fetched, content


def request(url: str, fetch_id: str = "tiny.1.0", peers: tuple[str, ...] = ()) -> FetchRequest:
    plan = make_plan(open_source(URI, endpoint_url=url), fetch_id=fetch_id)
    return FetchRequest(plan=plan, endpoint_url=url, region=None, peers=peers)


async def test_what_one_store_gave_is_never_taken_for_what_another_has(
    tmp_path: Path, twins: Twins
) -> None:
    node = Node(tmp_path / "tier")
    bad = request(twins.other_url, "bad.1.0")
    assert await node.use(bad) == (bad.plan.total_bytes, POISON)
    good = request(twins.mine_url, "good.1.0")
    assert await node.use(good) == (good.plan.total_bytes, twins.last_bytes)
    # Nor the other way round: the thief gets his own, though all of both is here.
    assert await node.use(request(twins.other_url, "bad.2.0")) == (0, POISON)
    assert await node.use(request(twins.mine_url, "good.2.0")) == (0, twins.last_bytes)
    await node.fetches.close()


async def test_a_peer_gives_nothing_of_another_store(tmp_path: Path, twins: Twins) -> None:
    holder, asker = Node(tmp_path / "holder"), Node(tmp_path / "asker")
    await holder.use(request(twins.other_url, "bad.1.0"))
    server = PeerServer(
        holder.tier, host="127.0.0.1", port=0, token=None, rate=RateLimit(1e12), most_connections=8
    )
    server.start()
    wanted = request(twins.mine_url, "good.1.0", peers=(f"127.0.0.1:{server.port}",))
    assert (await asker.use(wanted))[1] == twins.last_bytes
    await asyncio.to_thread(server.stop)
    await holder.fetches.close()
    await asker.fetches.close()


async def test_a_disk_gives_nothing_of_another_store(tmp_path: Path, twins: Twins) -> None:
    disk = DiskTier.open(tmp_path / "disk", disk_bytes=1 << 30)
    first = Node(tmp_path / "first", disk)
    await first.use(request(twins.other_url, "bad.1.0"))
    upkeep = DiskUpkeep(first.tier, disk)
    while upkeep.write_next():
        pass
    assert disk.contents()
    await first.fetches.close()
    second = Node(tmp_path / "second", disk)
    assert (await second.use(request(twins.mine_url, "good.1.0")))[1] == twins.last_bytes
    await second.fetches.close()
    disk.close()


@pytest.mark.parametrize("key", ["AKIDTEST", "SOMEBODYELSE"])
async def test_bytes_are_those_of_who_read_them(
    tmp_path: Path, twins: Twins, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    node = Node(tmp_path / "tier")
    wanted = request(twins.mine_url)
    await node.use(wanted)
    held, _ = await node.fetches.contents()
    await node.fetches.close()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    again = Node(tmp_path / "tier")
    fetched, _ = await again.use(request(twins.mine_url, "tiny.2.0"))
    assert fetched == (0 if key == "AKIDTEST" else wanted.plan.total_bytes)
    # The scheduler is told of nothing that a fetch of this node would not use.
    assert len((await again.fetches.contents())[0]) == len(held) > 0
    await again.fetches.close()


async def test_a_right_that_was_taken_back_is_noticed_though_every_byte_is_here(
    tmp_path: Path, twins: Twins
) -> None:
    node = Node(tmp_path / "tier")
    await node.use(request(twins.mine_url))
    again = request(twins.mine_url, "tiny.2.0")
    # Twice: a refused read is asked again, with the credentials of then.
    twins.mine.script.extend([refuse(403, "AccessDenied")] * 2)
    with pytest.raises(AccessDenied):
        await (await node.fetches.start(again, HANG_S)).wait()
    await node.fetches.close()


async def test_a_store_that_is_away_refuses_nothing(tmp_path: Path, twins: Twins) -> None:
    node = Node(tmp_path / "tier")
    await node.use(request(twins.mine_url))
    again = request(twins.mine_url, "tiny.2.0")
    twins.mine.script.append(refuse(503))
    assert (await node.use(again))[0] == 0
    await node.fetches.close()


def identity(url: str | None, principal: str | None = None) -> StoreIdentity:
    return Sources(principal=principal).open(URI, endpoint_url=url).store


def test_one_endpoint_has_one_spelling_and_tells_no_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    same = [
        identity(url) for url in ("http://s3.test", "http://u:p@S3.test:80/", "http://s3.test:80")
    ]
    assert {it.endpoint for it in same} == {"http://s3.test"}
    others = ["https://s3.test", "http://s3.test:81", "http://s3.test/a", "http://s4.test", None]
    assert len({identity(url).endpoint for url in others} | {"http://s3.test"}) == 6
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.test")
    assert identity(None) == same[0]


def test_a_principal_is_told_by_its_key_its_role_or_its_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = "http://s3.test"
    by_key = identity(url)
    assert "AKIDTEST" not in by_key.principal
    # The secret and the session say nothing of who it is.
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert identity(url) == by_key
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "SOMEBODYELSE")
    assert identity(url) != by_key
    assert identity(url, "us") == identity(url, "us") != identity(url, "them")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert identity(url) not in (by_key, identity(url, "us"))


def test_all_folders_are_one_store(tmp_path: Path) -> None:
    assert open_source(str(tmp_path)).store == FOLDERS
