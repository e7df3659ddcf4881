"""A standalone model's fetch has an owner: it starts it, ends it, and its failure is seen."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from paraserve_backend.errors import Cancelled, InsufficientCapacity, Unavailable
from paraserve_backend.roles.standalone_fetch import StandaloneFetch
from paraserve_backend.weights.sources.base import FOLDERS, Connection
from paraserve_backend.weights.sources.open import open_source
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.reader import TierReader
from tests.support.checkpoints import make_plan, tensor_bytes
from tests.support.limits import HANG_S


def folders() -> list[Path]:
    return list(Path("/dev/shm").glob(f"paraserve-standalone-{os.getpid()}-*"))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fetch")]


def test_its_bytes_arrive_and_nothing_is_left_of_it(model: Path) -> None:
    plan = make_plan(model)
    own = StandaloneFetch(plan, open_source(str(model)))
    own.start()
    reader = TierReader.open(own.tier_dir.path, own.fetch_id)
    for tensor in plan.tensors:
        reader.wait_for(tensor.name, timeout_s=HANG_S)
        assert bytes(reader.view(tensor.name)) == tensor_bytes(model, tensor)
    own.close()
    assert (folders(), threads()) == ([], [])


def test_one_that_never_started_can_be_closed(model: Path) -> None:
    StandaloneFetch(make_plan(model), open_source(str(model))).close()
    assert folders() == []


def test_one_without_room_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise InsufficientCapacity("no room")

    monkeypatch.setattr(Tier, "begin", refuse)
    with pytest.raises(InsufficientCapacity):
        StandaloneFetch(make_plan(model), open_source(str(model)))
    assert folders() == []


class _Source:
    """A source whose store never answers, or has a bug."""

    uri = "odd:"
    store = FOLDERS

    def __init__(self, error: Exception | None) -> None:
        self._error = error
        self.asked = threading.Event()
        self._aborted = threading.Event()

    def list(self) -> tuple[()]:
        return ()

    def connect(self) -> Connection:
        self.asked.set()
        if self._error is not None:
            raise self._error
        return self

    def read_into(self, *_: object) -> None:
        self._aborted.wait(HANG_S)
        raise Cancelled("aborted")

    def abort(self) -> None:
        self._aborted.set()

    def close(self) -> None:
        pass


def test_its_end_ends_reads_that_wait(model: Path) -> None:
    source = _Source(None)
    own = StandaloneFetch(make_plan(model), source)
    own.start()
    assert source.asked.wait(HANG_S)
    own.close()
    assert (folders(), threads()) == ([], [])


def test_a_bug_is_logged_with_its_traceback_and_readers_are_told(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan(model)
    own = StandaloneFetch(plan, _Source(RuntimeError("a bug")))
    reader = TierReader.open(own.tier_dir.path, own.fetch_id)
    own.start()
    with pytest.raises(Unavailable, match="the node's log says why"):
        reader.wait_for(plan.tensors[0].name, timeout_s=HANG_S)
    own.close()
    (record,) = [it for it in caplog.records if it.levelno == logging.ERROR]
    assert record.getMessage() == "the fetch of odd: failed"
    assert "a bug" in caplog.text
