from __future__ import annotations

from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

import pytest

from paraserve_scheduler.state.records import Failure, HandOverState, Phase, Replica
from paraserve_scheduler.store.recovery import record
from paraserve_scheduler.store.sqlite import SqliteStore
from tests.support.histories import History

#: Another value for each field whose change is written at once.
CHANGES: dict[str, Any] = {
    "phase": Phase.STOPPING,
    "ready_s": 11.5,
    "first_token_s": 12.5,
    "stopping_s": 13.5,
    "removed_s": 14.5,
    "hand_over": HandOverState(failed_successors=1, successor_failed_s=9.0),
}


def _served(history: History) -> Replica:
    name = history.serves()
    return history.view.replicas[name]


@pytest.mark.parametrize("field", fields(Replica), ids=lambda field: field.name)
def test_every_field_of_a_replica_says_whether_its_change_is_written(field: Field[Any]) -> None:
    assert isinstance(field.metadata.get("written"), bool)


def test_the_changes_tried_here_are_all_that_are_written() -> None:
    assert {field.name for field in fields(Replica) if field.metadata["written"]} == set(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_is_written_reaches_the_store(name: str, tmp_path: Path) -> None:
    history = History()
    before = history.view
    replica = _served(history)
    changed = replace(replica, **{name: CHANGES[name]})
    store = SqliteStore(tmp_path / "state.db")
    record(store, before, history.view)
    after = replace(history.view, replicas={replica.id: changed})
    record(store, history.view, after)
    assert store.replicas() == (changed,)
    store.close()


def test_the_rest_is_written_with_it(tmp_path: Path) -> None:
    history = History()
    before = history.view
    replica = _served(history)
    store = SqliteStore(tmp_path / "state.db")
    record(store, before, history.view)
    failure = Failure(grpc_code="UNAVAILABLE", message="Node n1 was lost.")
    unwritten = replace(replica, failure=failure, stop_reason="it failed")
    view = replace(history.view, replicas={replica.id: unwritten})
    record(store, history.view, view)
    assert store.replicas() == (replica,)
    stopped = replace(unwritten, phase=Phase.STOPPED)
    record(store, view, replace(view, replicas={replica.id: stopped}))
    assert store.replicas() == (stopped,)
    store.close()
