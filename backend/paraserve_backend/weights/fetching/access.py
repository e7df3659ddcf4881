"""Asks a store whether this node may still read what a fetch found elsewhere.

Bytes from host memory, a disk or a peer were read from the store once, by the same principal. That
it may read them still is for the store to say.
"""

from __future__ import annotations

import logging
import threading

from paraserve_backend.errors import AccessDenied, ParaServeError
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan
from paraserve_backend.weights.sources.base import BrokenTransfer, Connection, Source, StoredObject

logger = logging.getLogger(__name__)

#: A store that says nothing for so long has refused nothing.
_ANSWER_S = 2.0


def require_access(source: Source, plan: FetchPlan, *, answer_s: float = _ANSWER_S) -> None:
    """Read one byte of the plan's first object; raises `AccessDenied` where the store refuses.

    Whatever else comes of it ends nothing: bytes that are here must not depend on a store that is
    away, and of an object that has changed since the deployed version is here.
    """
    wanted = next((it for it in (*plan.objects, *plan.files) if it.size_bytes), None)
    if wanted is None:
        return
    asked = _Question(source, wanted)
    asked.thread.start()
    asked.thread.join(answer_s)
    if asked.thread.is_alive():
        asked.abort()
        logger.warning("store gave no answer, its bytes that are here are used uri=%s", source.uri)
    elif asked.refusal is not None:
        raise asked.refusal


class _Question:
    """One read in a thread of its own, which may hang."""

    def __init__(self, source: Source, wanted: StoredObject) -> None:
        self.refusal: AccessDenied | None = None
        self.thread = threading.Thread(target=self._ask, name="fetch-access", daemon=True)
        self._source = source
        self._wanted = wanted
        self._connection: Connection | None = None

    def abort(self) -> None:
        if self._connection is not None:
            self._connection.abort()

    def _ask(self) -> None:
        try:
            self._connection = self._source.connect()
            self._connection.read_into(self._wanted, 0, memoryview(bytearray(1)))
        except AccessDenied as refusal:
            self.refusal = refusal
        except (ParaServeError, BrokenTransfer, OSError) as error:
            logger.info("store not asked uri=%s reason=%s", self._source.uri, error)
        finally:
            if self._connection is not None:
                self._connection.close()
