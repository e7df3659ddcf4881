"""Sequences on their way in: whose blocks are kept, written and freed."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from paraserve_backend.engines.native.batcher import BlockPool
from paraserve_backend.engines.native.handover_target import HandOverTarget
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.hand_over import (
    Accepted,
    Complete,
    Expect,
    KvBlocks,
    Message,
    Offer,
    Refused,
)

SOURCE = "tcp://source:1"


@dataclass(slots=True)
class Bench:
    now_s: float = 0.0
    pool: BlockPool = field(default_factory=lambda: BlockPool(8))
    sent: list[Message] = field(default_factory=list)
    written: list[tuple[int, ...]] = field(default_factory=list)

    def target(self, *, holds_layers: bool = True) -> HandOverTarget:
        return HandOverTarget(
            self.pool,
            (lambda _message, blocks: self.written.append(tuple(blocks))) if holds_layers else None,
            lambda _address, message: self.sent.append(message),
            lambda: self.now_s,
        )


def offer(num_blocks: int, ticket: int = 7) -> Offer:
    return Offer(ticket=ticket, num_blocks=num_blocks, reply_to=SOURCE)


def kv(first: int, num_blocks: int, layers: tuple[int, int] = (0, 2)) -> KvBlocks:
    return KvBlocks(
        ticket=7,
        layer_start=layers[0],
        layer_end=layers[1],
        first=first,
        num_blocks=num_blocks,
        payload=b"",
    )


def test_blocks_of_all_stages_are_counted_and_then_claimed() -> None:
    bench = Bench()
    target = bench.target()
    target.offered(offer(4))
    target.received(kv(0, 2, layers=(0, 2)))
    target.received(Expect(ticket=7, layer_blocks=2 * 5))
    assert bench.sent == [Accepted(ticket=7)]
    target.received(kv(0, 2, layers=(2, 5)))
    assert bench.sent[1:] == [Complete(ticket=7, layer_blocks=10)]
    blocks = target.claim(7)
    assert blocks is not None
    assert bench.written == [tuple(blocks[:2]), tuple(blocks[:2])]
    assert target.blocks == []
    # They are the claimer's now.
    assert bench.pool.num_used == 4


def test_nothing_to_send_is_complete_at_once() -> None:
    bench = Bench()
    target = bench.target()
    target.offered(offer(1))
    target.received(Expect(ticket=7, layer_blocks=0))
    assert bench.sent[-1] == Complete(ticket=7, layer_blocks=0)


def test_a_sequence_whose_blocks_have_not_all_come_is_claimed_bare_and_frees_them() -> None:
    bench = Bench()
    target = bench.target()
    target.offered(offer(4))
    target.received(kv(0, 2))
    target.received(Expect(ticket=7, layer_blocks=10))
    assert target.claim(7) is None
    assert bench.pool.num_used == 0
    assert target.claim(8) is None


def test_an_offer_may_be_raised_and_is_refused_without_room() -> None:
    bench = Bench()
    target = bench.target()
    target.offered(offer(4))
    target.offered(offer(6))
    assert bench.pool.num_used == 6
    target.offered(offer(3, ticket=8))
    assert isinstance(bench.sent[-1], Refused)
    assert bench.pool.num_used == 6


def test_a_pipeline_refuses_blocks() -> None:
    bench = Bench()
    bench.target(holds_layers=False).offered(offer(1))
    assert isinstance(bench.sent[0], Refused)
    assert bench.pool.num_used == 0


def test_blocks_that_come_after_the_withdrawal_are_not_written() -> None:
    bench = Bench()
    target = bench.target()
    target.offered(offer(2))
    target.withdrawn(7)
    assert bench.pool.num_used == 0
    target.received(kv(0, 1))
    assert bench.written == []


def test_what_nobody_claims_is_freed() -> None:
    bench = Bench()
    target = bench.target()
    target.offered(offer(2))
    bench.now_s += 59
    target.expire()
    assert bench.pool.num_used == 2
    bench.now_s += 2
    target.expire()
    assert bench.pool.num_used == 0


def test_blocks_beyond_the_offer_are_refused() -> None:
    bench = Bench()
    target = bench.target()
    target.offered(offer(2))
    with pytest.raises(InvalidRequest, match="that nobody has offered"):
        target.received(kv(1, 2))
