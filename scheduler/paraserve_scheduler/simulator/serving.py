"""How one ready replica serves, simulated: prompts first, then all sequences decode together."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence

from paraserve_scheduler.planner.cost import (
    NodeKind,
    Speed,
    decode_s,
    full_speed_stages,
    prefill_s,
    slowest,
)
from paraserve_scheduler.simulator.clock import Heap
from paraserve_scheduler.simulator.workload import SimRequest


def pipeline_batch(
    heap: Heap,
    kinds: Sequence[NodeKind],
    model: str,
    *,
    full: int,
    ended: Callable[[SimRequest], None],
) -> Batch:
    """Return the batch of a replica whose stages are on nodes of `kinds`, `full` of them full."""
    speed, hop_s = slowest(kinds, model)
    return Batch(
        heap,
        speed,
        stages=len(kinds),
        full=full_speed_stages(kinds, len(kinds), full),
        hop_s=hop_s,
        ended=ended,
    )


class Batch:
    """The running requests of one replica.

    All decode at the same pace, so one count of decode steps made so far stands for every
    sequence: a request of n tokens ends n - 1 steps after its first token. While a prompt is
    worked on nothing decodes.
    """

    def __init__(
        self,
        heap: Heap,
        speed: Speed,
        *,
        stages: int,
        full: int,
        hop_s: float,
        ended: Callable[[SimRequest], None],
    ) -> None:
        self._heap = heap
        self._speed = speed
        self._shape = (stages, full, hop_s)
        self._ended = ended
        self._steps = 0.0
        self._updated_s = heap.now_s
        #: (step at which it ends, order, request)
        self._decoding: list[tuple[float, int, SimRequest]] = []
        self._prompts: deque[SimRequest] = deque()
        self._prefill_ends_s: float | None = None
        self._paused_until_s = 0.0
        self._version = 0
        self._count = 0

    @property
    def running(self) -> int:
        return len(self._decoding) + len(self._prompts)

    def requests(self) -> list[SimRequest]:
        return [*self._prompts, *(request for _, _, request in self._decoding)]

    def add(self, request: SimRequest) -> None:
        self._advance()
        self._prompts.append(request)
        self._plan()

    def reshape(self, *, stages: int, full: int, pause_s: float = 0.0) -> None:
        """From now on it runs in this shape, after standing still for `pause_s`."""
        self._advance()
        self._shape = (stages, full, self._shape[2])
        self._paused_until_s = self._heap.now_s + pause_s
        if self._prefill_ends_s is not None:
            self._prefill_ends_s += pause_s
        self._plan()

    def _step_s(self) -> float:
        stages, full, hop_s = self._shape
        return decode_s(
            self._speed, max(1, len(self._decoding)), stages=stages, full=full, hop_s=hop_s
        )

    def _advance(self) -> None:
        """Count the steps made since the last change."""
        now_s = self._heap.now_s
        since_s = max(self._updated_s, min(self._paused_until_s, now_s))
        if self._prefill_ends_s is None and self._decoding:
            self._steps += (now_s - since_s) / self._step_s()
        self._updated_s = now_s

    def _plan(self) -> None:
        """Ask to be woken at the next end of a prompt or of a request."""
        now_s = self._heap.now_s
        self._version += 1
        begin_s = max(now_s, self._paused_until_s)
        if self._prompts and self._prefill_ends_s is None:
            stages, full, hop_s = self._shape
            tokens = self._prompts[0].prompt_tokens
            self._prefill_ends_s = begin_s + prefill_s(
                self._speed, tokens, stages=stages, full=full, hop_s=hop_s
            )
        if self._prefill_ends_s is not None:
            self._heap.at(self._prefill_ends_s, self._wake, self._version)
        elif self._decoding:
            left = self._decoding[0][0] - self._steps
            self._heap.at(begin_s + max(0.0, left) * self._step_s(), self._wake, self._version)

    def _wake(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        if self._prefill_ends_s is not None:
            self._first_token()
        else:
            # The clock got here for the first of them, whatever rounding has made of it.
            self._steps = max(self._steps, self._decoding[0][0])
        ended = []
        while self._decoding and self._decoding[0][0] <= self._steps:
            ended.append(heapq.heappop(self._decoding)[2])
        self._plan()
        for request in ended:
            request.end_s = self._heap.now_s
            self._ended(request)

    def _first_token(self) -> None:
        request = self._prompts.popleft()
        self._prefill_ends_s = None
        if request.first_token_s is None:
            request.first_token_s = self._heap.now_s
        self._count += 1
        left = request.output_tokens - 1
        heapq.heappush(self._decoding, (self._steps + left, self._count, request))
