"""A request that is timed token by token, and what it felt of its replica's consolidation."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from paraserve_backend.errors import DeadlineExceeded, ParaServeError
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.client.generate import Piece
from paraserve_scheduler.client.scheduler import SchedulerClient

_POLL_S = 0.1


@dataclass(slots=True)
class TimedAnswer:
    #: Seconds since the epoch.
    asked_s: float = field(default_factory=time.time)
    #: When each token came.
    token_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.asked_s

    @property
    def decode_s(self) -> float:
        """From the first token to the last."""
        return self.token_s[-1] - self.token_s[0]

    def read(self, pieces: Iterable[Piece], stopping: threading.Event | None = None) -> None:
        """Take in what comes until it ends, or `stopping` is set."""
        for piece in pieces:
            self.token_s.extend([time.time()] * len(piece.token_ids))
            self.token_ids.extend(piece.token_ids)
            if stopping is not None and stopping.is_set():
                return


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """What requests felt when they changed from a pipeline to a full instance."""

    #: The pipeline's median time per token.
    tpot_s: float
    longest_s: float

    @property
    def over_tpot(self) -> float:
        return self.longest_s / self.tpot_s


def gap(answers: Sequence[TimedAnswer], pipeline: pb.ReplicaStatus) -> Gap:
    """Measure the longest pause between two tokens while `pipeline` handed its requests over.

    Raises:
        ParaServeError: no answer ran from before the hand-over into it.
    """
    before, during = [], []
    for answer in answers:
        for earlier_s, later_s in pairwise(answer.token_s):
            if later_s < pipeline.hand_over_begin_s:
                before.append(later_s - earlier_s)
            elif earlier_s < pipeline.hand_over_end_s:
                during.append(later_s - earlier_s)
    if not before or not during:
        raise ParaServeError("No request ran across the hand-over.")
    return Gap(tpot_s=statistics.median(before), longest_s=max(during))


def wait_until_removed(
    client: SchedulerClient, deployment: str, replica: str, *, timeout_s: float
) -> pb.ReplicaStatus:
    """Wait until a replica has left all its nodes; returns its last status.

    Raises:
        DeadlineExceeded: it has not.
    """
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        (state,) = client.status(deployment).deployments
        found = next((each for each in state.replicas if each.replica == replica), None)
        if found is not None and found.removed_s:
            return found
        time.sleep(_POLL_S)
    raise DeadlineExceeded(f"{replica} was not consolidated within {timeout_s:g} s.")
