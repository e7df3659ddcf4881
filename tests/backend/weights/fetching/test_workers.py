"""What the threads of several fetches do to one tier, and to the assignment's lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from paraserve_backend.byte_ranges import ByteRange
from paraserve_backend.weights.fetching.assignment import Assignment
from paraserve_backend.weights.fetching.fetch import FetchReport, fetch
from paraserve_backend.weights.fetching.tasks import FetchSource, Rank, missing_tasks
from paraserve_backend.weights.fetching.workers import FetchWorkers, Origins
from paraserve_backend.weights.sources.base import Connection, Source, StoredObject
from paraserve_backend.weights.sources.open import open_source
from paraserve_backend.weights.sources.retry import RetryPolicy
from paraserve_backend.weights.tiers.contents import Claim
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.reader import TierReader
from paraserve_backend.weights.tiers.writer import TierFetch
from tests.support.checkpoints import make_plan, tensor_bytes
from tests.support.limits import HANG_S
from tests.support.patience import patient_fetches

PART_BYTES = 700
IDS = ("first", "second", "third")


class CountingSource:
    """A folder that notes what is read of it, once so many fetches run at the same time."""

    def __init__(self, folder: Path, num_fetches: int) -> None:
        self._folder = open_source(str(folder))
        self.uri = self._folder.uri
        self.store = self._folder.store
        self.list = self._folder.list
        self._num_fetches = num_fetches
        self._running: set[str] = set()
        self.all_run = threading.Event()
        self.reads: list[tuple[str, int, int]] = []

    def connect(self) -> Connection:
        return _CountingConnection(self._folder.connect(), self)

    def runs(self, fetch_id: str) -> None:
        self._running.add(fetch_id)
        if len(self._running) == self._num_fetches:
            self.all_run.set()


class _CountingConnection:
    def __init__(self, connection: Connection, source: CountingSource) -> None:
        self._connection = connection
        self._source = source
        self.abort = connection.abort
        self.close = connection.close

    def read_into(self, stored: StoredObject, start: int, view: memoryview) -> None:
        self._source.all_run.wait(HANG_S)
        self._source.reads.append((stored.key, start, start + len(view)))
        self._connection.read_into(stored, start, view)


def begin_all(tier: Tier, model: Path) -> list[TierFetch]:
    return [tier.begin(make_plan(model, fetch_id=it), part_bytes=PART_BYTES) for it in IDS]


def claimed_ranges(writer: TierFetch) -> Iterator[tuple[str, ByteRange]]:
    for part in writer.parts:
        stored = next(it for it in writer.plan.objects if it.key == part.object_key)
        yield writer.name_of(stored), (part.start, part.end)
    for stored in writer.plan.files:
        yield writer.name_of(stored), (0, stored.size_bytes)


@pytest.mark.parametrize("threads", [1, 4])
def test_fetches_at_once_bring_every_byte_to_the_node_once(
    tier: Tier, model: Path, threads: int
) -> None:
    source = CountingSource(model, len(IDS))
    writers = begin_all(tier, model)

    def run(writer: TierFetch) -> FetchReport:
        return fetch(
            writer,
            source,
            tier,
            timeout_s=HANG_S,
            cancel=threading.Event(),
            threads=threads,
            on_progress=lambda *_: source.runs(writer.plan.fetch_id),
        )

    with patient_fetches(), ThreadPoolExecutor(len(IDS)) as pool:
        reports = list(pool.map(run, writers))
    plan = writers[0].plan
    file_bytes = sum(stored.size_bytes for stored in plan.files)
    assert sum(end - start for _, start, end in source.reads) == plan.total_bytes + file_bytes
    assert len(set(source.reads)) == len(source.reads)
    assert sum(it.store_bytes for it in reports) == plan.total_bytes + file_bytes
    assert {it.fetched_bytes + it.reused_bytes for it in reports} == {plan.total_bytes}
    for fetch_id in IDS:
        reader = TierReader.open(tier.directory, fetch_id)
        for tensor in plan.tensors:
            assert bytes(reader.view(tensor.name)) == tensor_bytes(model, tensor)
    # No claim is left over.
    assert {tier.claim(*it) for it in claimed_ranges(writers[0])} == {Claim.LANDED}


@pytest.fixture
def others() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_the_tier_is_never_asked_under_the_assignments_lock(
    tier: Tier, model: Path, others: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a worker is in the tier, another thread gets an answer of the assignment."""
    first, writer, _ = begin_all(tier, model)
    assignment = Assignment(missing_tasks(writer), link_bytes_per_s=None)
    nobody = FetchSource(Rank.PEER)
    called: list[str] = []

    def spy(target: Tier | TierFetch, name: str) -> None:
        method: Callable[..., Any] = getattr(target, name)

        def checked(*args: Any) -> Any:
            others.submit(assignment.lose, nobody).result(HANG_S)
            called.append(name)
            return method(*args)

        monkeypatch.setattr(target, name, checked)

    for name in ("claim", "unclaim", "adopt_files"):
        spy(tier, name)
    for name in ("write_part", "write_file", "adopt_part"):
        spy(writer, name)
    run_while_another_brings(first, tier, FetchWorkers(writer, tier, assignment, origins(model)))
    assert assignment.is_complete
    assert assignment.adopted_bytes > 0
    assert {"claim", "unclaim", "adopt_files", "write_part", "adopt_part"} <= set(called)


def origins(model: Path) -> Origins:
    source: Source = open_source(str(model))
    return Origins(store=source, threads=2, retry=RetryPolicy(), peers=(), disk=None)


def run_while_another_brings(other: TierFetch, tier: Tier, workers: FetchWorkers) -> None:
    """Run a fetch's workers; the other fetch brings two parts and the small files meanwhile."""
    folder = open_source(other.plan.source_uri).connect()
    brought = missing_tasks(other)
    brought = [it for it in brought if it.part is None or it.part < 2]
    claims = [(it.name, it.byte_range) for it in brought]
    assert {Tier.claim(tier, *claim) for claim in claims} == {Claim.GRANTED}

    def bring_now() -> None:
        if not claims:
            return
        for task in brought:
            content = memoryview(bytearray(task.size_bytes))
            folder.read_into(task.stored, task.start, content)
            if task.part is None:
                other.write_file(task.stored.key, content)
            else:
                other.write_part(task.part, content)
        while claims:
            Tier.unclaim(tier, *claims.pop())

    workers.run(bring_now)
    folder.close()
