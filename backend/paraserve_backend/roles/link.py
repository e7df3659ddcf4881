"""Role `link`: the head's connection to the activation channel.

It takes the first stage's hidden states from the ensemble, sends them to the next node, and answers
the ensemble when the last stage's result comes back. It imports no torch: hidden states are bytes.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paraserve_backend.channel.keys import CurveKeys
from paraserve_backend.channel.transport import Buffer, Channel, Frame, FrameKind
from paraserve_backend.daemon.guard import guarded
from paraserve_backend.errors import ParaServeError, Unavailable
from paraserve_backend.protocol.parameters import LinkConfig

logger = logging.getLogger(__name__)
#: A result frame holds a few bytes per sequence.
_MAX_RESULT_BYTES = 64 * 1024 * 1024

#: Called once with the encoded ForwardResult or the reason why there is none.
Answer = Callable[[Buffer | ParaServeError], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    answer: Answer
    deadline_s: float


class LinkRole:
    def __init__(self, config: LinkConfig) -> None:
        self._timeout_s = config.forward_timeout_s
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._channel = Channel(
            listen=config.channel.listen,
            next_address=config.channel.next,
            keys=CurveKeys.read(config.channel.key_file),
            max_bytes=_MAX_RESULT_BYTES,
        )
        self._receiver = threading.Thread(target=self._receive, name="link-receive", daemon=True)
        self._receiver.start()

    def forward(self, batch: bytes, hidden: npt.NDArray[np.uint8], answer: Answer) -> None:
        """Send one forward pass on its way; `answer` is called from another thread."""
        number = next(self._numbers)
        deadline_s = time.monotonic() + self._timeout_s
        with self._lock:
            self._pending[number] = _Pending(answer=answer, deadline_s=deadline_s)
        payload = np.ascontiguousarray(hidden).data.cast("B")
        try:
            self._channel.send(
                Frame(kind=FrameKind.FORWARD, number=number, body=batch, payload=payload)
            )
        except Unavailable as error:
            self._settle(number, error)

    def close(self) -> None:
        self._stopping.set()
        self._receiver.join()
        self._settle_all(Unavailable("The pipeline is being removed."))
        self._channel.close()

    def _receive(self) -> None:
        while not self._stopping.is_set():
            frame = self._channel.receive()
            if frame is not None:
                self._digest(frame)
            self._expire()

    def _digest(self, frame: Frame) -> None:
        match frame.kind:
            case FrameKind.RESULT:
                self._settle(frame.number, frame.body)
            case FrameKind.ERROR:
                sentence = bytes(frame.body).decode(errors="replace")
                self._settle(frame.number, Unavailable(sentence))
            case FrameKind.LOST:
                self._settle_all(Unavailable("The pipeline lost the connection to a stage."))
            case _:
                logger.warning("a frame of kind %s was dropped", frame.kind.name)

    def _settle_all(self, error: ParaServeError) -> None:
        for number in list(self._pending):
            self._settle(number, error)

    def _expire(self) -> None:
        now_s = time.monotonic()
        overdue = [n for n, pending in list(self._pending.items()) if pending.deadline_s <= now_s]
        for number in overdue:
            # Not the client's time limit: the request can go on at another replica.
            self._settle(
                number, Unavailable(f"The pipeline gave no answer within {self._timeout_s:g} s.")
            )

    def _settle(self, number: int, outcome: Buffer | ParaServeError) -> None:
        with self._lock:
            pending = self._pending.pop(number, None)
        if pending is None:
            logger.warning("a result came for forward pass %d after its time limit", number)
            return
        with guarded(logger, "the answer of a forward pass"):
            pending.answer(outcome)
