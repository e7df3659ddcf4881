"""Nodes that read each other's tiers, over real connections."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from paraserve_backend.agent.peer_server import PeerServer, RateLimit
from paraserve_backend.errors import Cancelled, InvalidRequest, SourceUnavailable
from paraserve_backend.weights.fetching.fetch import FetchReport, fetch
from paraserve_backend.weights.sources.base import Connection, Holding, Source, StoredObject
from paraserve_backend.weights.sources.open import open_source
from paraserve_backend.weights.sources.peer import (
    OBJECTS_PATH,
    HttpPeer,
    Peer,
)
from paraserve_backend.weights.sources.peer_auth import PeerQuestion
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.reader import TierReader
from tests.support.checkpoints import (
    land,
    make_plan,
    tensor_bytes,
    write_checkpoint,
)
from tests.support.limits import HANG_S
from tests.support.patience import patient_fetches

PART_BYTES = 50_000
TOKEN = "token"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of 3.3 MB in two shards."""
    return write_checkpoint(tmp_path / "model", width=4096, shards=2)


@contextmanager
def opened(folder: Path) -> Iterator[Tier]:
    tier = Tier.open(folder, cache_bytes=1 << 30)
    try:
        yield tier
        assert tier.check_integrity() == ()
    finally:
        tier.close()


@contextmanager
def served(tier: Tier, *, token: str | None = TOKEN, connections: int = 8) -> Iterator[HttpPeer]:
    server = PeerServer(
        tier,
        host="127.0.0.1",
        port=0,
        token=token,
        rate=RateLimit(1e12),
        most_connections=connections,
    )
    server.start()
    try:
        yield HttpPeer(address=f"127.0.0.1:{server.port}", token=token)
    finally:
        server.stop()


@pytest.fixture
def holder(tmp_path: Path, model: Path) -> Iterator[Tier]:
    """A tier that has all of the model cached."""
    with opened(tmp_path / "holder") as tier:
        writer = tier.begin(make_plan(model, fetch_id="held"), part_bytes=PART_BYTES)
        land(writer, model)
        writer.finish()
        tier.release("held")
        yield tier


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Tier]:
    with opened(tmp_path / "reader") as tier:
        yield tier


def run(tier: Tier, model: Path, *peers: Peer, source: Source | None = None) -> FetchReport:
    """Fetch with a link so slow that the peers are never too slow for it."""
    plan = make_plan(model)
    writer = tier.begin(plan, part_bytes=PART_BYTES)
    with patient_fetches():
        report = fetch(
            writer,
            source or open_source(str(model)),
            tier,
            timeout_s=HANG_S,
            cancel=threading.Event(),
            peers=peers,
            link_bytes_per_s=1.0,
        )
    found = TierReader.open(tier.directory, "fetch-1")
    for tensor in plan.tensors:
        assert bytes(found.view(tensor.name)) == tensor_bytes(model, tensor)
    for stored in plan.files:
        assert found.read_file(stored.key, timeout_s=0) == (model / stored.key).read_bytes()
    return report


def all_bytes(model: Path) -> int:
    plan = make_plan(model)
    return plan.total_bytes + sum(stored.size_bytes for stored in plan.files)


def test_what_a_peer_has_is_not_read_from_the_store(
    holder: Tier, reader: Tier, model: Path
) -> None:
    with served(holder) as peer:
        report = run(reader, model, peer)
    assert (report.store_bytes, report.peer_bytes) == (0, all_bytes(model))


def test_what_no_peer_has_comes_from_the_store(tmp_path: Path, reader: Tier, model: Path) -> None:
    with opened(tmp_path / "half") as half:
        writer = half.begin(make_plan(model, layers=(0, 2)), part_bytes=PART_BYTES)
        land(writer, model)
        writer.finish()
        with served(half) as peer:
            report = run(reader, model, peer)
    assert report.peer_bytes > 0
    assert report.peer_bytes + report.store_bytes == all_bytes(model)


def test_bytes_that_a_peer_is_still_fetching_are_waited_for(
    tmp_path: Path, reader: Tier, model: Path
) -> None:
    with opened(tmp_path / "first") as first, served(first) as peer:
        writer = first.begin(make_plan(model), part_bytes=PART_BYTES)
        land(writer, model, range(0, len(writer.parts), 2))
        reports: list[FetchReport] = []
        chained = threading.Thread(target=lambda: reports.append(run(reader, model, peer)))
        chained.start()
        land(writer, model)
        writer.finish()
        chained.join()
    assert reports[0].store_bytes == 0


def test_the_store_helps_where_the_peers_are_slow(holder: Tier, reader: Tier, model: Path) -> None:
    plan = make_plan(model)
    stalled = threading.Event()
    writer = reader.begin(plan, part_bytes=PART_BYTES)
    report = fetch(
        writer,
        open_source(str(model)),
        reader,
        timeout_s=HANG_S,
        cancel=threading.Event(),
        peers=[_StalledPeer(holder, stalled)],
        link_bytes_per_s=1e12,
        on_progress=lambda landed, _: stalled.set() if landed > plan.total_bytes // 2 else None,
    )
    assert report.store_bytes > plan.total_bytes // 2
    assert report.store_bytes + report.peer_bytes == all_bytes(model)


def test_a_peer_that_trickles_is_left_for_the_store(
    holder: Tier, reader: Tier, model: Path
) -> None:
    """It is never silent, and the fetch would take minutes."""
    plan = make_plan(model)
    writer = reader.begin(plan, part_bytes=PART_BYTES)
    with served(holder) as peer:
        report = fetch(
            writer,
            open_source(str(model)),
            reader,
            timeout_s=HANG_S,
            cancel=threading.Event(),
            peers=[_TricklingPeer(peer)],
            link_bytes_per_s=1e12,
        )
    assert report.store_bytes + report.peer_bytes == all_bytes(model)
    assert report.peer_bytes < 2 * PART_BYTES


class _TricklingPeer:
    """Sends 1 kB/s on each connection."""

    def __init__(self, inner: HttpPeer) -> None:
        self._inner = inner

    def holdings(self, names: Collection[str]) -> Mapping[str, Holding]:
        return self._inner.holdings(names)

    def connect(self, names: Mapping[str, str]) -> Connection:
        return _Trickling(self._inner.connect(names))


class _Trickling:
    def __init__(self, inner: Connection) -> None:
        self._inner = inner
        self._aborted = threading.Event()

    def read_into(self, stored: StoredObject, start: int, view: memoryview) -> None:
        for at in range(0, len(view), 500):
            self._inner.read_into(stored, start + at, view[at : at + 500])
            if self._aborted.wait(0.5):
                raise Cancelled("aborted")

    def abort(self) -> None:
        self._aborted.set()

    def close(self) -> None:
        self._inner.close()


class _StalledPeer:
    """Has everything and sends nothing before an event, and then breaks."""

    def __init__(self, tier: Tier, event: threading.Event) -> None:
        self._tier = tier
        self._event = event

    def holdings(self, names: Collection[str]) -> Mapping[str, Holding]:
        return self._tier.holdings(names)

    def connect(self, names: Mapping[str, str]) -> Connection:
        return self

    def read_into(self, stored: StoredObject, start: int, view: memoryview) -> None:
        self._event.wait(HANG_S)
        raise SourceUnavailable("gone")

    def abort(self) -> None:
        self._event.set()

    def close(self) -> None:
        pass


class _DyingPeer:
    """Breaks off after some reads, as if its server had closed the connections."""

    def __init__(self, inner: Peer) -> None:
        self._inner = inner

    def holdings(self, names: Collection[str]) -> Mapping[str, Holding]:
        return self._inner.holdings(names)

    def connect(self, names: Mapping[str, str]) -> Connection:
        return _Dying(self._inner.connect(names))


class _Dying:
    def __init__(self, inner: Connection) -> None:
        self._inner = inner
        self._left = 5

    def read_into(self, stored: StoredObject, start: int, view: memoryview) -> None:
        self._left -= 1
        if self._left == 0:
            self._inner.abort()
        try:
            self._inner.read_into(stored, start, view)
        except Cancelled:
            raise SourceUnavailable("it died") from None

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()


def test_a_peer_that_dies_half_way_costs_only_the_rest(
    holder: Tier, reader: Tier, model: Path
) -> None:
    with served(holder) as peer:
        report = run(reader, model, _DyingPeer(peer))
    assert report.peer_bytes > 0
    assert report.store_bytes > 0
    assert report.peer_bytes + report.store_bytes == all_bytes(model)


@pytest.mark.parametrize("token", ["wrong", None])
def test_a_wrong_token_opens_nothing_and_the_store_is_read(
    holder: Tier, reader: Tier, model: Path, token: str | None
) -> None:
    with served(holder) as peer:
        stranger = HttpPeer(address=peer.address, token=token)
        with pytest.raises(SourceUnavailable, match="403"):
            stranger.holdings(["x"])
        assert run(reader, model, stranger).peer_bytes == 0


def test_a_peer_that_is_not_there_costs_nothing(reader: Tier, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    report = run(reader, model, HttpPeer(address=address, token=TOKEN))
    assert report.store_bytes == all_bytes(model)


def test_another_version_of_an_object_is_not_taken(holder: Tier, reader: Tier, model: Path) -> None:
    write_checkpoint(model, width=4096, shards=2, num_layers=3)
    with served(holder) as peer:
        assert run(reader, model, peer).peer_bytes == 0


def test_ranges_that_are_not_there_are_refused_at_once(tmp_path: Path, model: Path) -> None:
    with opened(tmp_path / "half") as half, served(half) as peer:
        landing = half.begin(make_plan(model), part_bytes=PART_BYTES)
        land(landing, model, [0])
        part = landing.parts[0]
        name = landing.name_of(landing.object_of(0))
        size_bytes = landing.object_of(0).size_bytes
        client = http.client.HTTPConnection(peer.address, timeout=HANG_S)

        def status(target: str, range_: str | None) -> int:
            headers = {"Range": range_} if range_ else {}
            start, _, end = (range_ or "").removeprefix("bytes=").partition("-")
            byte_range = (int(start), int(end) + 1) if range_ else None
            asked = PeerQuestion.of(peer.address, target, byte_range)
            client.request("GET", target, headers=headers | asked.headers(TOKEN, time.time()))
            response = client.getresponse()
            response.read()
            return response.status

        path = OBJECTS_PATH + name
        assert status(path, f"bytes={part.start}-{part.end - 1}") == 206
        assert status(path, f"bytes={part.start}-{part.end}") == 416
        assert status(path, f"bytes={size_bytes}-{size_bytes}") == 416
        assert status(path, None) == 400
        assert status(OBJECTS_PATH + "0" * 40, "bytes=0-0") == 404
        assert status(OBJECTS_PATH + "../lock", "bytes=0-0") == 404
        assert status("/", None) == 404
        client.close()


def test_no_proxy_of_the_environment_stands_between_peers(
    holder: Tier, reader: Tier, model: Path, dead_proxies: None
) -> None:
    with served(holder) as peer:
        assert run(reader, model, peer).peer_bytes == all_bytes(model)


def test_more_reads_than_allowed_are_turned_away(holder: Tier, reader: Tier, model: Path) -> None:
    with served(holder, connections=1) as peer:
        report = run(reader, model, peer)
    assert report.peer_bytes + report.store_bytes == all_bytes(model)


def test_an_address_in_use_is_a_clear_error(holder: Tier) -> None:
    with served(holder) as peer:
        host, _, port = peer.address.rpartition(":")
        with pytest.raises(InvalidRequest, match=f"{peer.address}.*Address already in use"):
            PeerServer(
                holder,
                host=host,
                port=int(port),
                token=None,
                rate=RateLimit(1.0),
                most_connections=1,
            )


def test_a_rate_is_shared_and_kept() -> None:
    clock = [0.0]

    def pause(seconds: float) -> None:
        clock[0] += seconds

    rate = RateLimit(1000.0, now=lambda: clock[0], pause=pause)
    for _ in range(11):
        rate.wait(500)
    assert clock[0] == pytest.approx(5.0)
    clock[0] += 100  # what was not used is lost: no burst later
    rate.wait(1000)
    rate.wait(1000)
    assert clock[0] == pytest.approx(106.0)
