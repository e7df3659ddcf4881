"""The thread on which a replica reads and tokenises requests, in the order in which they came.

The thread that Triton calls only hands over: one long prompt must not keep it from the others.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from paraserve_backend.daemon.guard import guarded, internal_error
from paraserve_backend.engines.base import MAX_WAITING, Reply
from paraserve_backend.errors import Cancelled, ParaServeError, ResourceExhausted, Unavailable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arrival:
    reply: Reply
    #: Reads the request and passes it on; raises `ParaServeError` where it is refused.
    take_in: Callable[[], None]


class Intake:
    """`put` may be called from any thread."""

    def __init__(self) -> None:
        self._arrivals: queue.SimpleQueue[_Arrival | None] = queue.SimpleQueue()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)
        self._thread.start()

    def put(self, reply: Reply, take_in: Callable[[], None], *, is_begun: bool) -> None:
        """Have a request taken in; its errors, too, go to `reply`.

        Args:
            reply: where its answer goes.
            take_in: reads the request and passes it on.
            is_begun: it comes from another replica, where it has waited: it is never refused.

        Raises:
            ResourceExhausted: too many wait already.
        """
        if self._arrivals.qsize() >= MAX_WAITING and not is_begun:
            raise ResourceExhausted(
                f"{MAX_WAITING} requests wait to be read already; send it again later."
            )
        self._arrivals.put(_Arrival(reply=reply, take_in=take_in))

    def close(self) -> None:
        """Take in no more; whoever still waits gets an error."""
        self._is_closing.set()
        self._arrivals.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (arrival := self._arrivals.get()) is not None:
            with guarded(logger, "a request", partial(arrival.reply.fail, internal_error())):
                self._take_in(arrival)

    def _take_in(self, arrival: _Arrival) -> None:
        try:
            if self._is_closing.is_set():
                raise Unavailable("The model is being unloaded; send the request again.")
            if arrival.reply.is_cancelled():
                raise Cancelled("The client cancelled the request.")
            arrival.take_in()
        except ParaServeError as error:
            arrival.reply.fail(error)
