"""Bytes that were changed anywhere on their way, once the store has given them, are found."""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from paraserve_backend.agent.disk_upkeep import DiskUpkeep
from paraserve_backend.agent.peer_server import PeerServer, RateLimit
from paraserve_backend.errors import ParaServeError
from paraserve_backend.weights.fetching.fetch import FetchReport, fetch
from paraserve_backend.weights.sources.base import BrokenTransfer
from paraserve_backend.weights.sources.open import open_source
from paraserve_backend.weights.sources.peer import HttpPeer, Peer
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.layout import OBJECTS
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.reader import TierReader
from tests.support.checkpoints import make_plan, tensor_bytes, write_checkpoint
from tests.support.limits import HANG_S
from tests.support.patience import patient_fetches

PART_BYTES = 50_000
TOKEN = "token"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", width=4096, shards=2)


@dataclass(slots=True, kw_only=True)
class Node:
    tier: Tier
    disk: DiskTier | None = None

    def run(
        self, model: Path, fetch_id: str, *peers: Peer, layers: tuple[int, int] | None = None
    ) -> FetchReport:
        """Fetch, check every byte, and release."""
        plan = make_plan(model, fetch_id=fetch_id, layers=layers)
        with patient_fetches():
            report = fetch(
                self.tier.begin(plan, part_bytes=PART_BYTES),
                open_source(str(model)),
                self.tier,
                timeout_s=HANG_S,
                cancel=threading.Event(),
                peers=peers,
                disk=self.disk,
                link_bytes_per_s=1.0,
            )
        found = TierReader.open(self.tier.directory, fetch_id)
        for tensor in plan.tensors:
            assert bytes(found.view(tensor.name)) == tensor_bytes(model, tensor), tensor.name
        for stored in plan.files:
            assert found.read_file(stored.key, timeout_s=0) == (model / stored.key).read_bytes()
        self.tier.release(fetch_id)
        return report


@contextmanager
def opened(folder: Path, disk: DiskTier | None = None) -> Iterator[Node]:
    tier = Tier.open(folder, cache_bytes=1 << 30)
    yield Node(tier=tier, disk=disk)
    tier.close()


@contextmanager
def served(node: Node) -> Iterator[HttpPeer]:
    server = PeerServer(
        node.tier,
        host="127.0.0.1",
        port=0,
        token=TOKEN,
        rate=RateLimit(1e12),
        most_connections=8,
    )
    server.start()
    try:
        yield HttpPeer(address=f"127.0.0.1:{server.port}", token=TOKEN)
    finally:
        server.stop()


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        was = file.read(1)[0]
        file.seek(at)
        file.write(bytes([was ^ (1 << (at % 8))]))


@pytest.mark.parametrize("seed", range(4))
def test_a_byte_that_flips_in_a_peers_memory_is_found(
    tmp_path: Path, model: Path, seed: int
) -> None:
    with opened(tmp_path / "holder") as holder, opened(tmp_path / "reader") as reader:
        holder.run(model, "held.1.0")
        rng = random.Random(seed)
        objects = [it for it in holder.tier.contents() if it.stored.key.endswith("safetensors")]
        for found in objects:
            at = rng.randrange(*rng.choice(found.landed))
            flip(holder.tier.directory / OBJECTS / found.name, at)
        with served(holder) as peer:
            report = reader.run(model, "read.1.0", peer)
    # Every byte was compared in `run`; so it came from the store, with what the peer was not asked.
    assert report.store_bytes > 0


def test_a_byte_that_flips_is_found_by_who_needs_a_part_of_its_chunk(
    tmp_path: Path, model: Path
) -> None:
    with opened(tmp_path / "holder") as holder, served(holder) as peer:
        holder.run(model, "held.1.0")
        found = next(it for it in holder.tier.contents() if it.stored.key.endswith("safetensors"))
        piece = max(holder.tier.digests.of(found.name), key=lambda it: it.end - it.start)
        connection = peer.connect({found.stored.key: found.name})
        half = memoryview(bytearray((piece.end - piece.start) // 2))
        connection.read_into(found.stored, piece.start, half)
        assert half == (model / found.stored.key).read_bytes()[piece.start :][: len(half)]
        flip(holder.tier.directory / OBJECTS / found.name, piece.start + 1)
        with pytest.raises((ParaServeError, BrokenTransfer)):
            connection.read_into(found.stored, piece.start, half)
        connection.close()
        # It is no longer offered, either.
        assert piece.byte_range[0] not in {
            start for start, _ in holder.tier.holdings([found.name])[found.name].landed
        }


@pytest.mark.parametrize("kind", ["flipped", "truncated", "exchanged"])
def test_damage_on_a_disk_is_found(tmp_path: Path, model: Path, kind: str) -> None:
    disk = DiskTier.open(tmp_path / "disk", disk_bytes=1 << 30)
    with opened(tmp_path / "node", disk) as node:
        node.run(model, "first.1.0")
        upkeep = DiskUpkeep(node.tier, disk)
        while upkeep.write_next():
            pass
        files = sorted((tmp_path / "disk" / OBJECTS).glob("*/[0-9]*"))
        assert files
        for path in files:
            damage_file(path, kind)
        node.tier.limit_cache(0)
        report = node.run(model, "second.1.0")
    assert (report.disk_bytes, report.store_bytes > 0) == (0, True)
    disk.close()


def damage_file(path: Path, kind: str) -> None:
    match kind:
        case "flipped":
            flip(path, random.Random(path.name).randrange(path.stat().st_size))
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case _:
            path.write_bytes(random.Random(path.name).randbytes(path.stat().st_size))


def test_damage_in_memory_does_not_get_to_the_disk(tmp_path: Path, model: Path) -> None:
    disk = DiskTier.open(tmp_path / "disk", disk_bytes=1 << 30)
    with opened(tmp_path / "node", disk) as node:
        node.run(model, "first.1.0")
        for found in node.tier.contents():
            flip(node.tier.directory / OBJECTS / found.name, found.landed[0][0])
        upkeep = DiskUpkeep(node.tier, disk)
        while upkeep.write_next():
            pass
        node.tier.limit_cache(0)
        node.run(model, "second.1.0")  # compares
    disk.close()


def test_what_was_learnt_outlives_the_agent(tmp_path: Path, model: Path) -> None:
    with opened(tmp_path / "node") as node:
        node.run(model, "first.1.0")
        known = {it.name: set(node.tier.digests.of(it.name)) for it in node.tier.contents()}
    with opened(tmp_path / "node") as again:
        assert all(known.values())
        assert known == {it: set(again.tier.digests.of(it)) for it in known}


class _Spoiler(BaseHTTPRequestHandler):
    """Passes on to a true peer, and spoils what it answers."""

    protocol_version = "HTTP/1.1"
    server: _SpoilerServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        client = http.client.HTTPConnection(self.server.true_address, timeout=HANG_S)
        client.request("GET", self.path, headers=dict(self.headers.items()))
        answer = client.getresponse()
        body, headers = answer.read(), dict(answer.headers.items())
        client.close()
        if self.path.startswith("/objects/"):
            body = self.server.spoil(body, headers)
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = len(body) != int(headers["Content-Length"])


class _SpoilerServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, true_address: str, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Spoiler)
        self.true_address = true_address
        self.kind = kind
        self.num_spoilt = 0

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients leave when they have seen enough."""

    def spoil(self, body: bytes, headers: dict[str, str]) -> bytes:
        self.num_spoilt += 1
        match self.kind:
            case "flipped":
                at = len(body) // 3
                return body[:at] + bytes([body[at] ^ 4]) + body[at + 1 :]
            case "truncated":
                return body[:-1]
            case "another digest":
                headers["X-Paraserve-Digest"] = "7"
            case "another version":
                headers["X-Paraserve-Proof"] = "0" * 64
            case _:
                return b"\xee" * len(body)
        return body


@pytest.mark.parametrize(
    "kind", ["flipped", "truncated", "another digest", "another version", "all of it"]
)
def test_what_is_changed_on_the_way_from_a_peer_is_found(
    tmp_path: Path, model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path / "holder") as holder, opened(tmp_path / "reader") as reader:
        holder.run(model, "held.1.0")
        with served(holder) as peer:
            spoiler = _SpoilerServer(peer.address, kind)
            thread = threading.Thread(target=spoiler.serve_forever, args=(0.01,))
            thread.start()
            # On the way: whoever is asked is believed to be the true peer.
            monkeypatch.setattr(
                http.client.HTTPConnection, "connect", _connect_through(spoiler, peer.address)
            )
            report = reader.run(model, "read.1.0", peer)
            monkeypatch.undo()
            spoiler.shutdown()
            thread.join()
            spoiler.server_close()
    assert spoiler.num_spoilt > 0
    assert report.peer_bytes == 0


def _connect_through(spoiler: _SpoilerServer, address: str) -> object:
    true_connect = http.client.HTTPConnection.connect
    host, _, port = address.rpartition(":")

    def connect(client: http.client.HTTPConnection) -> None:
        is_readers = threading.current_thread().name.startswith("fetch")
        if is_readers and (client.host, client.port) == (host, int(port)):
            client.host, client.port = spoiler.server_address[0], spoiler.server_address[1]  # type: ignore[assignment]
            true_connect(client)
            client.host, client.port = host, int(port)
        else:
            true_connect(client)

    return connect


class _Rogue(BaseHTTPRequestHandler):
    """A host that has everything, and not the cluster's token."""

    protocol_version = "HTTP/1.1"
    server: _RogueServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.num_asked += 1
        if self.path.startswith("/holdings/"):
            names = self.path.removeprefix("/holdings/").split(",")
            body = self.server.holdings_of(names)
            headers: Mapping[str, str] = {}
        else:
            start, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
            body = b"\xee" * (int(end) + 1 - int(start))
            headers = {"Content-Range": f"bytes {start}-{end}/1", "X-Paraserve-Digest": "1"}
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class _RogueServer(ThreadingHTTPServer):
    daemon_threads = True
    num_asked = 0

    def holdings_of(self, names: list[str]) -> bytes:
        entries = ",".join(f'"{name}":{{"landed":[[0,99999999]],"coming":[]}}' for name in names)
        return f"{{{entries}}}".encode()


def test_a_host_without_the_token_is_believed_nothing(tmp_path: Path, model: Path) -> None:
    rogue = _RogueServer(("127.0.0.1", 0), _Rogue)
    thread = threading.Thread(target=rogue.serve_forever, args=(0.01,))
    thread.start()
    with opened(tmp_path / "reader") as reader:
        address = f"127.0.0.1:{rogue.server_address[1]}"
        report = reader.run(model, "read.1.0", HttpPeer(address=address, token=TOKEN))
    rogue.shutdown()
    thread.join()
    rogue.server_close()
    assert rogue.num_asked > 0
    assert report.peer_bytes == 0
