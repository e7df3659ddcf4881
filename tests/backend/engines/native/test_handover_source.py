"""Sequences on their way out, message by message, with a clock the test turns."""

from __future__ import annotations

from dataclasses import dataclass, field

from paraserve_backend.engines.native.handover_source import HandOverSource
from paraserve_backend.generation.sequence import TokenSequence
from paraserve_backend.protocol.forward import Export
from paraserve_backend.protocol.hand_over import (
    Accepted,
    Complete,
    Expect,
    Message,
    Offer,
    Refused,
    Target,
    Withdraw,
)
from paraserve_backend.protocol.sampling import Sampling

BLOCK_SIZE = 4
LAYERS = 3
TARGET = Target(replica="d.2", address="tcp://there:1")
OTHER = Target(replica="d.3", address="tcp://elsewhere:1")


@dataclass(slots=True)
class Bench:
    now_s: float = 100.0
    sent: list[tuple[str, Message]] = field(default_factory=list)
    #: Blocks a pass may send ahead.
    blocks_per_pass: int = 2

    def source(self) -> HandOverSource:
        source = HandOverSource(
            lambda address, message: self.sent.append((address, message)),
            inbox="tcp://here:1",
            block_size=BLOCK_SIZE,
            block_bytes=(4 << 20) // self.blocks_per_pass,
            num_layers=LAYERS,
            now_s=lambda: self.now_s,
        )
        source.set_targets((TARGET,))
        return source

    def messages(self) -> list[Message]:
        taken = [message for _, message in self.sent]
        self.sent.clear()
        return taken


def make_sequence(num_tokens: int) -> TokenSequence:
    """A decoding sequence: all but its newest token is in the cache."""
    blocks = -(-num_tokens // BLOCK_SIZE)
    return TokenSequence(
        prompt_ids=[1] * (num_tokens - 1),
        sampling=Sampling(),
        max_tokens=100,
        output_ids=[2],
        num_computed=num_tokens - 1,
        block_table=list(range(10, 10 + blocks)),
    )


def step(source: HandOverSource, sequence: TokenSequence) -> tuple[Export, ...]:
    """One decoding pass, up to its return."""
    exports = source.exports([(sequence, sequence.num_tokens)])
    sequence.num_computed += 1
    sequence.append(3)
    source.returned(sequence)
    return exports


def ticket_of(bench: Bench) -> int:
    (offer,) = bench.messages()
    assert isinstance(offer, Offer)
    return offer.ticket


def test_a_sequence_moves_block_by_block_and_waits_only_for_its_last_ones() -> None:
    bench = Bench()
    source, sequence = bench.source(), make_sequence(18)
    source.offer([sequence])
    ((address, offer),) = bench.sent
    assert isinstance(offer, Offer)
    assert (address, offer.reply_to) == (TARGET.address, "tcp://here:1")
    bench.messages()
    assert step(source, sequence) == ()
    source.answered(Accepted(ticket=offer.ticket))

    (first,) = step(source, sequence)
    assert (first.first, first.blocks, first.ticket) == (0, (10, 11), offer.ticket)
    (second,) = step(source, sequence)
    assert (second.first, second.blocks) == (2, (12, 13))
    assert bench.messages() == [Expect(ticket=offer.ticket, layer_blocks=4 * LAYERS)]
    # The target does not have them yet: decoding goes on.
    assert step(source, sequence) == ()
    assert not sequence.is_held

    assert source.answered(Complete(ticket=offer.ticket, layer_blocks=4 * LAYERS)) is None
    sequence.block_table.append(15)
    (last,) = step(source, sequence)
    assert (last.first, last.blocks) == (4, (14, 15))
    assert sequence.is_held
    assert bench.messages() == [Expect(ticket=offer.ticket, layer_blocks=6 * LAYERS)]
    moved = source.answered(Complete(ticket=offer.ticket, layer_blocks=6 * LAYERS))
    assert moved is not None
    assert (moved.sequence, moved.target, moved.ticket) == (sequence, TARGET, offer.ticket)
    assert source.counts.handed_over == 1
    assert (source.counts.blocks_ahead, source.counts.blocks_held) == (4, 2)


def held(bench: Bench, source: HandOverSource, sequence: TokenSequence) -> int:
    """Bring a short sequence to its last step; returns its ticket."""
    source.offer([sequence])
    ticket = ticket_of(bench)
    source.answered(Accepted(ticket=ticket))
    step(source, sequence)
    source.answered(Complete(ticket=ticket, layer_blocks=0))
    step(source, sequence)
    assert sequence.is_held
    bench.messages()
    return ticket


def test_a_target_that_dies_at_the_last_step_costs_a_second_and_no_token() -> None:
    bench = Bench()
    source, sequence = bench.source(), make_sequence(2)
    ticket = held(bench, source, sequence)
    bench.now_s += 0.9
    source.expire()
    assert sequence.is_held
    bench.now_s += 0.2
    source.expire()
    assert not sequence.is_held
    assert bench.messages() == [Withdraw(ticket=ticket)]
    # Its answer comes too late: the sequence is ours again.
    assert source.answered(Complete(ticket=ticket, layer_blocks=LAYERS)) is None


def test_after_a_failure_the_sequence_rests_before_it_is_offered_again() -> None:
    bench = Bench()
    source, sequence = bench.source(), make_sequence(9)
    source.offer([sequence])
    ticket = ticket_of(bench)
    source.answered(Refused(ticket=ticket, reason="no room"))
    assert bench.messages() == [Withdraw(ticket=ticket)]
    source.offer([sequence])
    assert bench.messages() == []
    bench.now_s += 3
    source.offer([sequence])
    assert ticket_of(bench) != ticket


def test_the_target_is_asked_for_more_room_when_the_sequence_outgrows_it() -> None:
    bench = Bench(blocks_per_pass=1)
    source, sequence = bench.source(), make_sequence(3)
    source.offer([sequence])
    ticket = ticket_of(bench)
    source.answered(Accepted(ticket=ticket))
    step(source, sequence)
    bench.messages()
    for block in range(20, 26):
        sequence.block_table.append(block)
        for _ in range(BLOCK_SIZE):
            step(source, sequence)
    source.answered(Complete(ticket=ticket, layer_blocks=0))
    assert step(source, sequence) == ()
    (offer,) = bench.messages()
    assert isinstance(offer, Offer)
    assert (offer.ticket, offer.num_blocks >= len(sequence.block_table)) == (ticket, True)
    source.answered(Accepted(ticket=ticket))
    assert step(source, sequence)[0].first == 0


def test_another_target_calls_back_what_is_on_its_way_to_the_old_one() -> None:
    bench = Bench()
    source, sequence = bench.source(), make_sequence(2)
    ticket = held(bench, source, sequence)
    source.set_targets((OTHER,))
    assert not sequence.is_held
    assert bench.messages() == [Withdraw(ticket=ticket)]
    source.offer([sequence])
    assert bench.sent[0][0] == OTHER.address


def test_several_targets_share_the_sequences() -> None:
    bench = Bench()
    source = bench.source()
    source.set_targets((TARGET, OTHER))
    source.offer([make_sequence(5) for _ in range(6)])
    addresses = [address for address, _ in bench.sent]
    assert addresses.count(TARGET.address) == addresses.count(OTHER.address) == 3


def test_a_sequence_that_ends_on_its_way_is_called_off() -> None:
    bench = Bench()
    source, sequence = bench.source(), make_sequence(2)
    ticket = held(bench, source, sequence)
    source.gone(sequence)
    assert bench.messages() == [Withdraw(ticket=ticket)]
    assert source.answered(Complete(ticket=ticket, layer_blocks=LAYERS)) is None
