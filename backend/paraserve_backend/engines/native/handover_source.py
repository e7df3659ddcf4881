"""The source's side of a hand-over: sequences that are leaving for another replica.

A sequence is decoded further while its full KV blocks are copied. Its last pass here sends the
rest; then it is held until the target has everything. If a step is refused or takes too long, the
sequence stays. Used by the generate loop's thread only.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial

from paraserve_backend.daemon.guard import guarded
from paraserve_backend.generation.sequence import TokenSequence
from paraserve_backend.protocol.forward import Export
from paraserve_backend.protocol.hand_over import (
    Accepted,
    Complete,
    Expect,
    Message,
    Offer,
    Refused,
    SendMessage,
    Target,
    Withdraw,
)

logger = logging.getLogger(__name__)

#: KV that one forward pass may send ahead: decoding must not wait for the network.
_BYTES_PER_PASS = 4 << 20
#: Blocks the target keeps for tokens that come while the others are copied.
_SPARE_BLOCKS = 4
#: More than so many blocks are not sent while a sequence is held.
_MOST_HELD_BLOCKS = 2
_COPY_TIMEOUT_S = 30.0
_HELD_TIMEOUT_S = 1.0
#: After a target has refused or been silent.
_RETRY_S = 2.0


class _Step(Enum):
    OFFERED = auto()
    #: Full blocks are being sent along with passes.
    COPYING = auto()
    #: They have been sent; the target has not said that it has them.
    ARRIVING = auto()
    #: The next pass sends the rest.
    LEAVING = auto()
    #: That pass is under way.
    LAST_PASS = auto()
    HELD = auto()


@dataclass(slots=True, kw_only=True, eq=False)
class _OutgoingSequence:
    sequence: TokenSequence
    target: Target
    ticket: int
    step: _Step
    deadline_s: float
    reserved_blocks: int
    #: Blocks `[0, next_block)` have been sent.
    next_block: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A sequence whose KV blocks the target has."""

    sequence: TokenSequence
    target: Target
    ticket: int


@dataclass(slots=True, kw_only=True)
class HandOverCounts:
    """What has been done so far."""

    handed_over: int = 0
    #: Sent while the sequence was decoded.
    blocks_ahead: int = 0
    #: Sent with a last pass: the sequence waited for them.
    blocks_held: int = 0


class HandOverSource:
    def __init__(
        self,
        send: SendMessage,
        *,
        inbox: str,
        block_size: int,
        block_bytes: int,
        num_layers: int,
        now_s: Callable[[], float],
    ) -> None:
        """Begin with no target.

        Args:
            send: sends a message to an inbox.
            inbox: where the targets' answers go.
            block_size: tokens in a KV block.
            block_bytes: of one block on all layers together.
            num_layers: of the model.
            now_s: a monotonic clock.
        """
        self._send = send
        self._inbox = inbox
        self._block_size = block_size
        self._blocks_per_pass = max(1, _BYTES_PER_PASS // block_bytes)
        self._num_layers = num_layers
        self._now_s = now_s
        self._targets: tuple[Target, ...] = ()
        self._turn = 0
        self._outgoing: dict[TokenSequence, _OutgoingSequence] = {}
        self._by_ticket: dict[int, _OutgoingSequence] = {}
        #: Until when a sequence that could not leave is left alone.
        self._rests: dict[TokenSequence, float] = {}
        self.counts = HandOverCounts()

    @property
    def is_active(self) -> bool:
        return bool(self._targets)

    @property
    def is_bare(self) -> bool:
        """Whether sequences go without their KV blocks: the targets run another engine."""
        return any(not target.address for target in self._targets)

    def set_targets(self, targets: tuple[Target, ...]) -> None:
        """Set where sequences shall go from now on; those on their way elsewhere stay."""
        for outgoing in list(self._outgoing.values()):
            if outgoing.target not in targets:
                self._withdraw(outgoing)
        self._targets = targets
        self._rests.clear()

    def next_target(self) -> Target:
        """Share the sequences out."""
        self._turn += 1
        return self._targets[self._turn % len(self._targets)]

    def offer(self, sequences: Iterable[TokenSequence]) -> None:
        """Offer those decoding sequences that are not on their way yet."""
        now_s = self._now_s()
        for sequence in sequences:
            if sequence in self._outgoing or self._rests.get(sequence, 0.0) > now_s:
                continue
            self._rests.pop(sequence, None)
            outgoing = _OutgoingSequence(
                sequence=sequence,
                target=self.next_target(),
                ticket=secrets.randbits(63) + 1,
                step=_Step.OFFERED,
                deadline_s=now_s + _HELD_TIMEOUT_S,
                reserved_blocks=self._blocks_for(sequence.num_tokens) + _SPARE_BLOCKS,
            )
            self._outgoing[sequence] = outgoing
            self._by_ticket[outgoing.ticket] = outgoing
            self._send_offer(outgoing)

    def exports(self, rows: Iterable[tuple[TokenSequence, int]]) -> tuple[Export, ...]:
        """Return what a pass shall send; `rows` are its sequences and where each will end."""
        if not self._outgoing:
            return ()
        exports = []
        budget = self._blocks_per_pass
        for sequence, end in rows:
            outgoing = self._outgoing.get(sequence)
            if outgoing is None:
                continue
            export = None
            with guarded(logger, "the hand-over of a request", partial(self._withdraw, outgoing)):
                export = self._export(outgoing, end, budget)
            if export is not None:
                budget -= len(export.blocks)
                exports.append(export)
        return tuple(exports)

    def returned(self, sequence: TokenSequence) -> None:
        """Hold a sequence whose last pass has come back."""
        outgoing = self._outgoing.get(sequence)
        if outgoing is None or outgoing.step is not _Step.LAST_PASS:
            return
        outgoing.step = _Step.HELD
        outgoing.deadline_s = self._now_s() + _HELD_TIMEOUT_S
        sequence.is_held = True
        self._expect(outgoing)

    def answered(self, message: Accepted | Refused | Complete) -> Moved | None:
        """Take in a target's answer; returns what has moved by it, for the caller to end here."""
        outgoing = self._by_ticket.get(message.ticket)
        if outgoing is None:
            return None
        match message:
            case Accepted():
                if outgoing.step is _Step.OFFERED:
                    outgoing.step = _Step.COPYING
                    outgoing.deadline_s = self._now_s() + _COPY_TIMEOUT_S
            case Refused():
                logger.info("hand-over to %s refused: %s", outgoing.target.replica, message.reason)
                self._withdraw(outgoing)
            case Complete():
                return self._completed(outgoing, message.layer_blocks)
        return None

    def gone(self, sequence: TokenSequence) -> None:
        """Forget a sequence that has ended or lost its blocks here; it may be offered again."""
        self._rests.pop(sequence, None)
        outgoing = self._outgoing.get(sequence)
        if outgoing is not None:
            self._withdraw(outgoing)
            self._rests.pop(sequence, None)

    def expire(self) -> None:
        """Keep the sequences whose target did not answer in time."""
        now_s = self._now_s()
        for outgoing in list(self._outgoing.values()):
            if outgoing.step is not _Step.LAST_PASS and outgoing.deadline_s <= now_s:
                logger.warning("hand-over to %s timed out", outgoing.target.replica)
                self._withdraw(outgoing)

    def _completed(self, outgoing: _OutgoingSequence, layer_blocks: int) -> Moved | None:
        if layer_blocks != outgoing.next_block * self._num_layers:
            return None
        if outgoing.step is _Step.ARRIVING:
            outgoing.step = _Step.LEAVING
        elif outgoing.step is _Step.HELD:
            self._forget(outgoing)
            self.counts.handed_over += 1
            return Moved(sequence=outgoing.sequence, target=outgoing.target, ticket=outgoing.ticket)
        return None

    def _export(self, outgoing: _OutgoingSequence, end: int, budget: int) -> Export | None:
        """What this pass sends of one sequence, whose positions will then be `[0, end)`."""
        sequence = outgoing.sequence
        num_blocks = self._blocks_for(end)
        if outgoing.step is _Step.LEAVING:
            if num_blocks > outgoing.reserved_blocks:
                self._raise_offer(outgoing, num_blocks)
                return None
            if num_blocks - outgoing.next_block <= _MOST_HELD_BLOCKS:
                outgoing.step = _Step.LAST_PASS
                self.counts.blocks_held += num_blocks - outgoing.next_block
                return self._sent(outgoing, num_blocks)
            outgoing.step = _Step.COPYING
        if outgoing.step is not _Step.COPYING:
            return None
        # Blocks that were full before this pass do not change any more.
        full = sequence.num_computed // self._block_size
        until = min(full, outgoing.next_block + budget, outgoing.reserved_blocks)
        export = self._sent(outgoing, until) if until > outgoing.next_block else None
        if export is not None:
            self.counts.blocks_ahead += len(export.blocks)
        if outgoing.next_block >= min(full, outgoing.reserved_blocks):
            outgoing.step = _Step.ARRIVING
            self._expect(outgoing)
        return export

    def _sent(self, outgoing: _OutgoingSequence, until: int) -> Export:
        first, outgoing.next_block = outgoing.next_block, until
        return Export(
            address=outgoing.target.address,
            ticket=outgoing.ticket,
            first=first,
            blocks=tuple(outgoing.sequence.block_table[first:until]),
        )

    def _raise_offer(self, outgoing: _OutgoingSequence, num_blocks: int) -> None:
        outgoing.step = _Step.OFFERED
        outgoing.deadline_s = self._now_s() + _HELD_TIMEOUT_S
        outgoing.reserved_blocks = num_blocks + _SPARE_BLOCKS
        self._send_offer(outgoing)

    def _send_offer(self, outgoing: _OutgoingSequence) -> None:
        self._notify(
            outgoing,
            Offer(
                ticket=outgoing.ticket,
                num_blocks=outgoing.reserved_blocks,
                reply_to=self._inbox,
            ),
        )

    def _expect(self, outgoing: _OutgoingSequence) -> None:
        layer_blocks = outgoing.next_block * self._num_layers
        self._notify(outgoing, Expect(ticket=outgoing.ticket, layer_blocks=layer_blocks))

    def _withdraw(self, outgoing: _OutgoingSequence) -> None:
        self._forget(outgoing)
        self._rests[outgoing.sequence] = self._now_s() + _RETRY_S
        outgoing.sequence.is_held = False
        self._notify(outgoing, Withdraw(ticket=outgoing.ticket))

    def _forget(self, outgoing: _OutgoingSequence) -> None:
        del self._outgoing[outgoing.sequence]
        del self._by_ticket[outgoing.ticket]

    def _notify(self, outgoing: _OutgoingSequence, message: Message) -> None:
        self._send(outgoing.target.address, message)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
