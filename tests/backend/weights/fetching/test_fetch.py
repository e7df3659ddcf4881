from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paraserve_backend.daemon.retry import Backoff
from paraserve_backend.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidCheckpoint,
    ParaServeError,
    SourceUnavailable,
    Unavailable,
)
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan
from paraserve_backend.weights.fetching.fetch import FetchReport, fetch
from paraserve_backend.weights.sources import s3
from paraserve_backend.weights.sources.base import FOLDERS, Connection, ObjectRange, Source
from paraserve_backend.weights.sources.open import open_source
from paraserve_backend.weights.sources.retry import RetryPolicy
from paraserve_backend.weights.tiers.layout import FetchStatus
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.reader import TierReader
from tests.support.checkpoints import make_plan, tensor_bytes, write_checkpoint
from tests.support.limits import HANG_S
from tests.support.stores import (
    BUCKET,
    Get,
    ScriptedStore,
    Step,
    answer_well,
    cut_after,
    rclone_store,
    refuse,
    serve,
    stall_after,
    throttle,
    with_header,
)

PART_BYTES = 700
QUICK = RetryPolicy(attempts=4, backoff=Backoff(base_s=0.001))


def run(
    plan: FetchPlan,
    source: Source,
    tier: Tier,
    *,
    timeout_s: float = HANG_S,
    threads: int = 4,
    cancel: threading.Event | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> FetchReport:
    """Fetch in parts that are small even for a tiny model."""
    return fetch(
        tier.begin(plan, part_bytes=PART_BYTES),
        source,
        tier,
        timeout_s=timeout_s,
        threads=threads,
        cancel=cancel or threading.Event(),
        retry=QUICK,
        on_progress=on_progress,
    )


def assert_complete(tier: Tier, fetch_id: str, folder: Path) -> None:
    reader = TierReader.open(tier.directory, fetch_id)
    for tensor in reader.plan.tensors:
        reader.wait_for(tensor.name, timeout_s=0)
        assert bytes(reader.view(tensor.name)) == tensor_bytes(folder, tensor)
    for stored in reader.plan.files:
        assert reader.read_file(stored.key, timeout_s=0) == (folder / stored.key).read_bytes()


def assert_readers_raise(tier: Tier, error: type[ParaServeError]) -> None:
    reader = TierReader.open(tier.directory, "fetch-1")
    with pytest.raises(error):
        reader.wait_for(reader.plan.tensors[-1].name, timeout_s=HANG_S)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_folder_is_fetched_byte_for_byte(tier: Tier, model: Path, threads: int) -> None:
    plan = make_plan(model, layers=(1, 4))
    report = run(plan, open_source(str(model)), tier, threads=threads)
    assert_complete(tier, "fetch-1", model)
    assert (report.fetched_bytes, report.reused_bytes) == (plan.total_bytes, 0)
    assert report.file_bytes == sum(stored.size_bytes for stored in plan.files)
    assert report.first_part_s is not None
    assert report.first_part_s <= report.total_s


@pytest.mark.usefixtures("aws_environment")
def test_a_model_in_a_real_object_store_is_fetched_byte_for_byte(
    tier: Tier, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "store" / BUCKET / "tiny", shards=3, width=4096)
    with rclone_store(tmp_path / "store") as url:
        source = open_source(f"s3://{BUCKET}/tiny", endpoint_url=url)
        writer = tier.begin(make_plan(source))
        fetch(writer, source, tier, timeout_s=HANG_S, cancel=threading.Event())
    assert_complete(tier, "fetch-1", folder)


def test_progress_only_grows_and_ends_at_the_total(tier: Tier, model: Path) -> None:
    plan = make_plan(model)
    seen: list[tuple[int, int]] = []
    run(plan, open_source(str(model)), tier, on_progress=lambda *it: seen.append(it))
    assert seen == sorted(seen)
    assert seen[-1] == (plan.total_bytes, plan.total_bytes)


def test_a_finished_fetch_is_not_repeated(tier: Tier, model: Path) -> None:
    plan = make_plan(model)
    run(plan, open_source(str(model)), tier)
    again = run(plan, open_source(str(model)), tier)
    assert (again.fetched_bytes, again.reused_bytes) == (0, plan.total_bytes)
    assert again.first_part_s is None


class BrokenSource:
    """A source with a bug."""

    uri = "broken:"
    store = FOLDERS

    def list(self) -> tuple[()]:
        return ()

    def connect(self) -> Connection:
        raise RuntimeError("a bug")


def test_readers_do_not_hang_on_a_bug_in_the_fetch(tier: Tier, model: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        run(make_plan(model), BrokenSource(), tier)
    assert_readers_raise(tier, Unavailable)


@pytest.fixture
def store(model: Path) -> ScriptedStore:
    return ScriptedStore({f"tiny/{path.name}": path.read_bytes() for path in model.iterdir()})


@pytest.fixture
def remote(
    store: ScriptedStore, aws_environment: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Source]:
    """The store, whose reads end no earlier than it answers, or than somebody ends them."""
    monkeypatch.setattr(s3, "_TIMEOUT_S", 2 * HANG_S)
    with serve(store) as url:
        yield open_source(f"s3://{BUCKET}/tiny", endpoint_url=url)


@pytest.fixture
def plan(remote: Source, store: ScriptedStore) -> FetchPlan:
    plan = make_plan(remote)
    store.gets.clear()
    store.sent_bytes = 0
    return plan


def wanted_bytes(plan: FetchPlan) -> int:
    return plan.total_bytes + sum(stored.size_bytes for stored in plan.files)


def test_nothing_is_asked_for_twice_and_nothing_unneeded(
    tier: Tier, model: Path, remote: Source, plan: FetchPlan, store: ScriptedStore
) -> None:
    run(plan, remote, tier)
    assert_complete(tier, "fetch-1", model)
    assert store.requested_bytes == wanted_bytes(plan)
    assert len({get.client_port for get in store.gets}) <= 4


def test_a_cut_connection_is_resumed_where_it_broke(
    tier: Tier, model: Path, remote: Source, plan: FetchPlan, store: ScriptedStore
) -> None:
    # Two small files and the first part, which is shorter than the others.
    store.script.extend([answer_well] * 3 + [cut_after(300), cut_after(100), cut_after(0)])
    report = run(plan, remote, tier, threads=1)
    assert_complete(tier, "fetch-1", model)
    assert report.retries == 3
    assert store.requested_bytes == wanted_bytes(plan) + 400 + 300 + 300
    assert store.sent_bytes == wanted_bytes(plan)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_errors_of_the_store_that_pass_are_survived(
    tier: Tier, model: Path, remote: Source, plan: FetchPlan, store: ScriptedStore, status: int
) -> None:
    store.script.extend([refuse(status, "SlowDown")] * 3)
    report = run(plan, remote, tier, threads=1)
    assert_complete(tier, "fetch-1", model)
    assert report.retries == 3


def test_errors_of_the_store_that_stay_end_the_fetch(
    tier: Tier, remote: Source, plan: FetchPlan, store: ScriptedStore
) -> None:
    store.script.extend([refuse(500)] * 1000)
    with pytest.raises(SourceUnavailable, match="4 attempts: the store answered HTTP 500"):
        run(plan, remote, tier)
    assert_readers_raise(tier, SourceUnavailable)
    assert len(store.gets) <= 4 * QUICK.attempts


def test_a_fetch_that_failed_goes_on_with_what_is_missing(
    tier: Tier, model: Path, remote: Source, plan: FetchPlan, store: ScriptedStore
) -> None:
    store.script.extend([answer_well] * 6 + [refuse(404, "NoSuchKey")])
    with pytest.raises(ParaServeError):
        run(plan, remote, tier, threads=1)
    run(plan, remote, tier)
    assert_complete(tier, "fetch-1", model)
    assert store.requested_bytes == wanted_bytes(plan) + PART_BYTES


@contextmanager
def held_from(store: ScriptedStore, key: str, start: int) -> Iterator[None]:
    """Let no byte from here on out before the block ends."""
    store.held = (f"tiny/{key}", start)
    yield
    store.release.set()


def test_one_failure_ends_the_other_threads_reads(
    tier: Tier, remote: Source, plan: FetchPlan, store: ScriptedStore
) -> None:
    changed = with_header("ETag", '"replaced"')
    store.script.extend([answer_well, answer_well, stall_after(3), stall_after(0), changed])
    with pytest.raises(InvalidCheckpoint, match="has changed"):
        run(plan, remote, tier)
    assert store.waiting.wait(HANG_S)
    assert store.num_waiting > 0  # the stalled answers have not ended
    assert_readers_raise(tier, InvalidCheckpoint)


@pytest.mark.parametrize("sent_bytes", [0, 100])
def test_a_cancel_ends_reads_that_wait(
    tier: Tier, remote: Source, plan: FetchPlan, store: ScriptedStore, sent_bytes: int
) -> None:
    store.script.extend([stall_after(sent_bytes)] * 4)
    cancel = threading.Event()

    def cancel_once_stalled() -> None:
        store.waiting.wait(HANG_S)
        cancel.set()

    canceller = threading.Thread(target=cancel_once_stalled)
    canceller.start()
    with pytest.raises(Cancelled, match="fetch-1 was cancelled"):
        run(plan, remote, tier, cancel=cancel)
    canceller.join()
    assert store.num_waiting > 0  # the stalled answers have not ended
    assert_readers_raise(tier, Cancelled)
    tier.release("fetch-1")
    assert tier.used_bytes == 0


def test_a_cancel_ends_the_wait_for_a_retry(
    tier: Tier, remote: Source, plan: FetchPlan, store: ScriptedStore
) -> None:
    store.script.extend([refuse(503)] * 100)
    cancel = threading.Event()
    patient = RetryPolicy(backoff=Backoff(base_s=1000, limit_s=1000))
    with pytest.raises(Cancelled):
        fetch(
            tier.begin(plan),
            remote,
            tier,
            timeout_s=HANG_S,
            cancel=cancel,
            retry=patient,
            on_progress=lambda *_: cancel.set() if len(store.gets) >= 4 else None,
        )


def test_the_time_limit_ends_reads_that_wait(
    tier: Tier, remote: Source, plan: FetchPlan, store: ScriptedStore
) -> None:
    store.script.extend([stall_after(100)] * 4)
    with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s: 0 of"):
        run(plan, remote, tier, timeout_s=0.2)
    assert_readers_raise(tier, DeadlineExceeded)


def test_tensors_are_read_before_the_fetch_has_ended(
    tier: Tier, model: Path, remote: Source, plan: FetchPlan, store: ScriptedStore
) -> None:
    tier.begin(plan, part_bytes=PART_BYTES)
    last = plan.tensors[-1]
    worker = threading.Thread(target=run, args=(plan, remote, tier))
    with held_from(store, last.object_key, last.start):
        worker.start()
        reader = TierReader.open(tier.directory, "fetch-1")
        early = [it for it in plan.tensors if it.object_key != last.object_key]
        assert early
        for tensor in early:
            reader.wait_for(tensor.name, timeout_s=HANG_S)
            assert bytes(reader.view(tensor.name)) == tensor_bytes(model, tensor)
        assert not reader.has_landed(last.name)
        (status,) = {it.status for it in tier.fetches()}
        assert status is FetchStatus.RUNNING
    worker.join()
    assert_complete(tier, "fetch-1", model)


def test_two_fetches_of_one_object_ask_for_each_byte_once(
    tier: Tier, model: Path, remote: Source, store: ScriptedStore
) -> None:
    stage = make_plan(remote, fetch_id="stage", layers=(0, 2))
    whole = make_plan(remote, fetch_id="whole")
    store.gets.clear()
    run(stage, remote, tier)
    report = run(whole, remote, tier)
    assert_complete(tier, "stage", model)
    assert_complete(tier, "whole", model)
    again_bytes = report.fetched_bytes + stage.total_bytes - whole.total_bytes
    assert 0 <= again_bytes < 4 * PART_BYTES
    assert report.reused_bytes == whole.total_bytes - report.fetched_bytes


@pytest.mark.parametrize("slowness", [stall_after(100), throttle(40)])
def test_what_a_connection_brings_far_too_slowly_is_brought_by_another(
    tier: Tier,
    model: Path,
    remote: Source,
    plan: FetchPlan,
    store: ScriptedStore,
    slowness: Step,
) -> None:
    part = tier.begin(plan, part_bytes=PART_BYTES).parts[1]
    store.steps_at[f"tiny/{part.object_key}", part.start] = slowness
    report = run(plan, remote, tier, threads=2)
    assert not store.release.is_set()  # the slow answer has not ended
    assert_complete(tier, "fetch-1", model)
    assert report.store_bytes == wanted_bytes(plan)
    assert 0 < store.requested_bytes - wanted_bytes(plan) <= PART_BYTES


def test_the_first_layers_are_asked_for_first(
    tier: Tier, remote: Source, plan: FetchPlan, store: ScriptedStore
) -> None:
    run(plan, remote, tier, threads=1)
    places = [
        next(at for at, get in enumerate(store.gets) if holds(get, wanted))
        for wanted in plan.ranges
    ]
    assert places == sorted(places)


def holds(get: Get, wanted: ObjectRange) -> bool:
    return get.key == f"tiny/{wanted.object_key}" and get.start <= wanted.start < get.end
