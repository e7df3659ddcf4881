from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_scheduler.simulator.clock import Heap
from paraserve_scheduler.simulator.network import Network

_INTO = ("into", "n0")


class _Ends:
    """When which transfer ended."""

    def __init__(self, capacity: float = 10.0) -> None:
        self.heap = Heap()
        self.network = Network(self.heap, {_INTO: capacity})
        self.at_s: dict[str, float] = {}

    def begin(self, name: str, size: float, *, rank: int = 0) -> None:
        def done() -> None:
            self.at_s[name] = self.heap.now_s

        self.network.begin(size, node="n0", links=(_INTO,), done=done, rank=rank)

    def run(self) -> None:
        while self.heap.next_s() < float("inf"):
            self.heap.step()


def test_two_transfers_share_and_the_longer_one_goes_on_alone() -> None:
    ends = _Ends()
    ends.begin("short", 10)
    ends.begin("long", 30)
    ends.run()
    assert ends.at_s == {"short": pytest.approx(2.0), "long": pytest.approx(4.0)}


def test_what_runs_in_the_background_waits_and_is_no_claim() -> None:
    ends = _Ends()
    ends.begin("background", 10, rank=-1)
    ends.begin("start", 20)
    assert [claim.remaining_bytes for claim in ends.network.claims()["n0"]] == [20]
    ends.run()
    assert ends.at_s == {"start": pytest.approx(2.0), "background": pytest.approx(3.0)}


def test_a_cancelled_transfer_gives_its_share_back() -> None:
    ends = _Ends()
    ends.begin("kept", 20)
    gone = ends.network.begin(20, node="n0", links=(_INTO,), done=lambda: None)
    ends.heap.at(1.0, ends.network.cancel, gone)
    ends.run()
    assert ends.at_s["kept"] == pytest.approx(2.5)


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(10, 5_000)), min_size=1, max_size=12))
def test_every_byte_arrives_and_the_link_is_never_exceeded(
    transfers: list[tuple[float, float]],
) -> None:
    ends = _Ends()
    for number, (at_s, size) in enumerate(transfers):
        ends.heap.at(at_s, ends.begin, str(number), size)
    ends.run()
    total = sum(size for _, size in transfers)
    assert len(ends.at_s) == len(transfers)
    assert ends.network.moved_into(["n0"]) == pytest.approx(total, abs=len(transfers))
    first_s = min(at_s for at_s, _ in transfers)
    # A transfer ends when less than half a byte is left.
    moved = total - len(transfers) / 2
    assert max(ends.at_s.values()) - first_s >= moved / 10.0 - 1e-6
