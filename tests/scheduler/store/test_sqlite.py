from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.telemetry.spans import Span, SpanName
from paraserve_scheduler.state.records import Failure, HandOverState, Phase, Replica
from paraserve_scheduler.store.records import dump, load
from paraserve_scheduler.store.sqlite import Counters, SqliteStore
from tests.support.histories import History
from tests.support.scheduler_records import make_deployment


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(path)
    yield store
    store.close()


def _replica() -> Replica:
    """A replica with every kind of field set."""
    history = History()
    name = history.serves()
    replica = history.view.replicas[name]
    failure = Failure(grpc_code="UNAVAILABLE", message="Node n1 was lost.")
    spans = (
        Span(name=SpanName.LOAD, detail="tiny.1", start_s=1.25, end_s=2.5, size_bytes=100),
        Span.parse("what a newer node does", start_s=1.25, end_s=2.5),
    )
    parts = (replica.parts[0], replace(replica.parts[1], spans=spans, failure=failure))
    return replace(replica, parts=parts, failure=failure, stop_reason="it failed")


def test_records_come_back_equal() -> None:
    replica = _replica()
    assert load(Replica, dump(replica)) == replica


def test_a_span_is_kept_under_one_name() -> None:
    part = json.loads(dump(_replica()))["parts"][1]
    expected = {"name": "load tiny.1", "start_s": 1.25, "end_s": 2.5, "size_bytes": 100}
    assert part["spans"][0] == expected


@pytest.mark.parametrize("text", ["{}", '{"plan": 1}', '{"unknown": 1}', "[]"])
def test_records_of_another_version_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Replica of this version"):
        load(Replica, text)


def test_what_is_stored_is_there_after_reopening(path: Path) -> None:
    store = SqliteStore(path)
    deployment = replace(make_deployment(ttft_slo_s=2.5), longest_token_bytes=48)
    replica = _replica()
    store.add_deployment(deployment, 1_000.0)
    store.save_replica(replica)
    store.save_counters("tiny", Counters(last_number=3, failure_number=2))
    store.mark_deleting("tiny")
    store.close()
    again = SqliteStore(path)
    (stored,) = again.deployments()
    assert stored.deployment.spec == deployment.spec
    assert stored.deployment.model == deployment.model
    assert stored.deployment.index == deployment.index
    assert stored.deployment.longest_token_bytes == 48
    assert (stored.deployed_s, stored.deleting) == (1_000.0, True)
    assert again.replicas() == (replica,)
    assert again.counters("tiny") == Counters(last_number=3, failure_number=2)
    again.close()


def test_a_dropped_deployment_leaves_only_its_numbers(store: SqliteStore) -> None:
    store.add_deployment(make_deployment(), 1_000.0)
    store.save_replica(_replica())
    store.save_counters("tiny", Counters(last_number=3, failure_number=2))
    store.drop_deployment("tiny")
    assert store.deployments() == ()
    assert store.replicas() == ()
    assert store.counters("tiny").last_number == 3


def test_a_replica_is_kept_in_its_newest_form(store: SqliteStore) -> None:
    replica = _replica()
    store.save_replica(replica)
    store.save_replica(replace(replica, phase=Phase.STOPPED))
    assert [stored.phase for stored in store.replicas()] == [Phase.STOPPED]
    store.drop_replica(replica.id)
    assert store.replicas() == ()


def test_a_deployment_keeps_its_keys_until_it_is_dropped(path: Path) -> None:
    store = SqliteStore(path)
    for name in ("a", "b"):
        store.add_deployment(make_deployment(name), 1_000.0)
    keys = store.channel_keys("a")
    store.close()
    again = SqliteStore(path)
    assert again.channel_keys("a") == keys != again.channel_keys("b")
    assert len(keys.secret_key) == 40
    assert keys.secret_key not in repr(keys)
    again.drop_deployment("a")
    again.add_deployment(make_deployment("a"), 1_001.0)
    assert again.channel_keys("a") != keys
    again.close()


def test_only_its_owner_may_read_what_holds_keys(path: Path) -> None:
    path.touch(mode=0o644)
    store = SqliteStore(path)
    store.add_deployment(make_deployment(), 1_000.0)
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}
    store.close()


def test_drained_nodes_stay_drained(path: Path) -> None:
    store = SqliteStore(path)
    store.save_cordoned_nodes({"n0", "n1"})
    store.save_cordoned_nodes({"n1", "n2"})
    store.close()
    again = SqliteStore(path)
    assert again.cordoned_nodes() == {"n1", "n2"}
    again.close()


def test_a_state_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"Cannot use state file .*nowhere"):
        SqliteStore(tmp_path / "nowhere" / "state.db")


@pytest.mark.usefixtures("store")
def test_two_schedulers_cannot_share_a_state_file(path: Path) -> None:
    with pytest.raises(InvalidRequest, match="Does another scheduler run on it"):
        SqliteStore(path)


def test_a_state_file_of_another_version_is_refused(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(InvalidRequest, match="written by another version"):
        SqliteStore(path)


def test_a_state_file_of_schema_2_is_read_on(path: Path) -> None:
    """There the state of a hand-over lay flat in the replica's record."""
    replica = replace(
        _replica(),
        hand_over=HandOverState(
            notified=("tiny.2",), since_s=7.0, failed_successors=1, successor_failed_s=5.0
        ),
    )
    store = SqliteStore(path)
    store.save_replica(replica)
    store.close()
    record = json.loads(dump(replica))
    del record["hand_over"]
    record |= {
        "targets": ["tiny.2"],
        "telling": False,
        "telling_failed_s": None,
        "hand_over_s": 7.0,
        "failed_successors": 1,
        "successor_failed_s": 5.0,
    }
    connection = sqlite3.connect(path)
    connection.execute("UPDATE replicas SET record = ?", (json.dumps(record),))
    connection.execute("PRAGMA user_version = 2")
    connection.commit()
    connection.close()
    for _ in range(2):  # the second time it is of this version
        store = SqliteStore(path)
        assert store.replicas() == (replica,)
        store.close()


def test_of_what_was_deployed_under_schema_3_no_longest_token_is_known(path: Path) -> None:
    store = SqliteStore(path)
    store.add_deployment(replace(make_deployment(), longest_token_bytes=48), 1_000.0)
    store.close()
    connection = sqlite3.connect(path)
    connection.execute("ALTER TABLE deployments DROP COLUMN longest_token_bytes")
    connection.execute("PRAGMA user_version = 3")
    connection.commit()
    connection.close()
    for _ in range(2):  # the second time it is of this version
        store = SqliteStore(path)
        (stored,) = store.deployments()
        assert stored.deployment.longest_token_bytes == 0
        assert stored.deployment.index == make_deployment().index
        store.close()
