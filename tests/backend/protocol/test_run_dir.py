from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.protocol.names import fetch_id, replica_id
from paraserve_backend.protocol.run_dir import RunDir, TierDir

RUN = RunDir(Path("/dev/shm/run"))
_REPLICAS = st.builds(
    replica_id, st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True), st.integers(0)
)


def test_paths_are_what_they_always_were() -> None:
    """An agent finds what an earlier one has left; a slot's process may be older than its agent."""
    assert RUN.tier.path == Path("/dev/shm/run/tier")
    assert RUN.tier.fetches == Path("/dev/shm/run/tier/fetches")
    assert RUN.tier.fetch("tiny.1.0") == Path("/dev/shm/run/tier/fetches/tiny.1.0")
    assert RUN.tier.spans("tiny.1.0") == Path("/dev/shm/run/tier/fetches/tiny.1.0/spans.jsonl")
    assert RUN.keys == Path("/dev/shm/run/keys")
    assert RUN.key_file("tiny.1") == Path("/dev/shm/run/keys/tiny.1/curve.key")


def test_nothing_is_made(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.tier.spans("tiny.1.0")
    run_dir.key_file("tiny.1")
    assert list(tmp_path.iterdir()) == []


@given(st.lists(_REPLICAS, unique=True), st.integers(0))
def test_replicas_and_fetches_have_paths_of_their_own_below_it(
    replicas: list[str], stage: int
) -> None:
    fetches = [fetch_id(replica, stage) for replica in replicas]
    paths = [*map(RUN.key_file, replicas), *map(RUN.tier.spans, fetches)]
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(RUN.path) for path in paths)


def test_a_tier_needs_no_run_dir() -> None:
    assert RUN.tier == TierDir(Path("/dev/shm/run/tier"))
