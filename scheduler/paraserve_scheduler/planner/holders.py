"""Who has which layers of one model, as one node sees it. Pure.

Every layer counts once: for the node's host memory, else its disk, else the first peer that has
it. The rest only the store has.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from paraserve_scheduler.planner.cost import ModelShape
from paraserve_scheduler.planner.fetch_time import Amounts

Spans = Sequence[tuple[int, int]]


class Holders:
    """Bytes by holder, as prefix sums over the layers; made once, asked often."""

    def __init__(
        self,
        model: ModelShape,
        *,
        memory: Spans = (),
        disk: Spans = (),
        peers: Sequence[Spans] = (),
    ) -> None:
        self._model = model
        left = set(range(model.num_layers))
        self._memory = _take(model, memory, left)
        self._disk = _take(model, disk, left)
        self._peers = tuple(_take(model, spans, left) for spans in peers)

    def amounts(self, start: int, end: int) -> Amounts:
        """What the node lacks of layers `[start, end)`."""
        total = self._model.bytes_of(start, end)
        return Amounts(
            total_bytes=total - self._of(self._memory, start, end),
            disk_bytes=self._of(self._disk, start, end),
            peers_bytes=tuple(self._of(prefix, start, end) for prefix in self._peers),
        )

    def _of(self, prefix: Sequence[int] | None, start: int, end: int) -> int:
        if prefix is None:
            return 0
        model = self._model
        held = prefix[end] - prefix[start]
        # Who has the last layer has all that a last stage needs.
        if model.tied_bytes and start > 0 and end == model.num_layers and prefix[end] > prefix[-2]:
            held += model.tied_bytes
        return held


def _take(model: ModelShape, spans: Spans, left: set[int]) -> list[int] | None:
    """Prefix sums of the layers in `spans` that nobody before has, taken out of `left`."""
    if not spans:
        return None
    taken = left & {layer for low, high in spans for layer in range(low, high)}
    left -= taken
    sizes = (size if layer in taken else 0 for layer, size in enumerate(model.layer_bytes))
    return [0, *accumulate(sizes)]
