"""Reads requests: small ones at once, large ones in a process of their own.

Parsing four mebibytes of hostile JSON takes half a second and cannot be interrupted, in a thread
neither: it holds the interpreter's lock. In steps on the event loop it would need parsers of our
own for JSON and for protobuf. A process needs neither, can be limited in time and memory, and what
it returns is large only where raw bytes are, which the loop copies in a millisecond.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import sys
from asyncio.subprocess import PIPE, Process

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import ParaServeError, Unavailable
from paraserve_scheduler.gateway import large_request_worker
from paraserve_scheduler.gateway.admission import ClientRequest
from paraserve_scheduler.gateway.kserve.errors import Overloaded, TooLarge
from paraserve_scheduler.gateway.large_request_worker import FRAME_LENGTH, Reading
from paraserve_scheduler.gateway.reading import MAX_SMALL_BYTES, UnreadRequest, read

logger = logging.getLogger(__name__)

#: Imports take half a second of processor time.
_START_LIMIT_S = 60.0
_RETRY_AFTER_S = 1.0
_STANDSTILL_S = 30.0


class RequestReading:
    """Reads between `start` and `stop`; belongs to one event loop."""

    def __init__(
        self, *, max_request_bytes: int, max_large_requests: int, large_request_timeout_s: float
    ) -> None:
        self.max_request_bytes = max_request_bytes
        self._max_large_requests = max_large_requests
        self._timeout_s = large_request_timeout_s
        self._starting: asyncio.Task[_Worker] | None = None
        #: One is read at a time.
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[ClientRequest]] = set()

    def start(self) -> None:
        """Start the process in the background, so that no request waits for its imports."""
        self._starting = asyncio.create_task(_Worker.start(self.max_request_bytes, self._timeout_s))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._end()

    async def read(self, request: UnreadRequest) -> ClientRequest:
        """Read and check a request.

        Raises:
            TooLarge: it is larger than the limit, packed or unpacked.
            InvalidRequest: it cannot be read at all.
            Overloaded: as many large requests are being read as may.
            TooCostly: it takes more time or memory than any request may.
        """
        try:
            return read(request.unpacked(min(MAX_SMALL_BYTES, self.max_request_bytes)))
        except TooLarge:
            return await self._read_aside(request)

    async def _read_aside(self, request: UnreadRequest) -> ClientRequest:
        if len(self._tasks) >= self._max_large_requests:
            raise Overloaded(
                f"This gateway reads {self._max_large_requests} large requests already; "
                "retry later.",
                retry_after_s=_RETRY_AFTER_S,
            )
        # A task of its own: the process answers also when the client has left.
        task = asyncio.create_task(self._read_in_turn(request))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[ClientRequest]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever still waits has got it

    async def _read_in_turn(self, request: UnreadRequest) -> ClientRequest:
        async with self._turn:
            reading = await self._ask(request)
        if isinstance(reading, ParaServeError):
            raise reading
        message, checked, binary = reading
        return ClientRequest(
            message=kserve.ModelInferRequest.FromString(message), checked=checked, binary=binary
        )

    async def _ask(self, request: UnreadRequest) -> Reading | ParaServeError:
        worker = await self._worker()
        try:
            # The process keeps the limit itself; this one is for a process that stands still.
            async with asyncio.timeout(self._timeout_s + _STANDSTILL_S):
                return await worker.ask(request)
        except TimeoutError:
            await self._replace("stands still")
        except (OSError, EOFError):
            await self._replace("has ended")
        raise _unavailable()

    async def _worker(self) -> _Worker:
        if self._starting is None:
            self.start()
        assert self._starting is not None
        try:
            return await asyncio.shield(self._starting)
        except (OSError, EOFError, TimeoutError) as error:
            logger.error("The process that reads large requests does not start: %r", error)
            self._starting = None
            raise _unavailable() from None

    async def _replace(self, why: str) -> None:
        logger.warning("The process that reads large requests %s; it is started again.", why)
        await self._end()
        self.start()

    async def _end(self) -> None:
        starting, self._starting = self._starting, None
        if starting is None:
            return
        starting.cancel()
        await asyncio.wait({starting})
        if not starting.cancelled() and starting.exception() is None:
            await starting.result().end()


def _unavailable() -> Unavailable:
    return Unavailable("This gateway cannot read large requests now; retry later.")


class _Worker:
    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, max_request_bytes: int, timeout_s: float) -> _Worker:
        """Start the process and wait until it can read.

        Raises:
            EOFError: it has ended.
            TimeoutError: it was not ready in time.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            large_request_worker.__name__,
            str(max_request_bytes),
            str(timeout_s),
            stdin=PIPE,
            stdout=PIPE,
            # As many as a frame may have: more would wait for nobody.
            limit=2 * max_request_bytes,
            # Its forks end with it, and an interrupt at the terminal is for the gateway.
            start_new_session=True,
        )
        worker = cls(process)
        try:
            async with asyncio.timeout(_START_LIMIT_S):
                await worker._frame()
        except BaseException:
            await worker.end()
            raise
        return worker

    async def ask(self, request: UnreadRequest) -> Reading | ParaServeError:
        """Have it read a request.

        Raises:
            OSError: it has ended before it had all of the request.
            EOFError: it has ended with the request.
        """
        assert self._process.stdin is not None
        frame = pickle.dumps(request)
        self._process.stdin.write(FRAME_LENGTH.pack(len(frame)))
        self._process.stdin.write(frame)
        await self._process.stdin.drain()
        answer: Reading | ParaServeError = pickle.loads(await self._frame())
        return answer

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    async def _frame(self) -> bytes:
        assert self._process.stdout is not None
        head = await self._process.stdout.readexactly(FRAME_LENGTH.size)
        return await self._process.stdout.readexactly(*FRAME_LENGTH.unpack(head))
