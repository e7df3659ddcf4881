"""Listens for HTTP: hands aiohttp what comes in small pieces, and keeps what it quotes out of logs.

asyncio reads up to 256 KiB at once. In chunks of one byte each, aiohttp needs 0.4 s for that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from aiohttp import web

from paraserve_backend.errors import InvalidRequest

_PIECE_BYTES = 8 << 10
_BACKLOG = 128


class HttpListener:
    """Listens between `start` and `stop`."""

    def __init__(self, application: web.Application, *, shutdown_timeout_s: float) -> None:
        logger = logging.getLogger(__name__)
        logger.addFilter(_without_text)
        # A client that goes away cancels its handler, and that its request at the replica.
        self._runner = web.AppRunner(
            application,
            # The service unpacks requests itself, within its limit.
            auto_decompress=False,
            handler_cancellation=True,
            access_log=None,
            logger=logger,
            # Of chunks of one byte each it holds twice as many, and joins them at once.
            read_bufsize=_PIECE_BYTES,
            shutdown_timeout=shutdown_timeout_s,
        )
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port.

        Raises:
            InvalidRequest: the address cannot be listened on.
        """
        await self._runner.setup()
        make_inner = self._runner.server
        assert make_inner is not None
        try:
            self._server = await asyncio.get_running_loop().create_server(
                lambda: _InPieces(make_inner), host, port, backlog=_BACKLOG
            )
        except OSError as error:
            raise InvalidRequest(
                f"Cannot listen on http_address {host}:{port}: {error.strerror}."
            ) from None
        port = self._server.sockets[0].getsockname()[1]
        return port

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()


class _InPieces(asyncio.BufferedProtocol):
    """Stands between a connection and aiohttp, which it lets do everything but the reading."""

    def __init__(self, make_inner: Callable[[], asyncio.Protocol]) -> None:
        self._inner = make_inner()
        self._buffer = bytearray(_PIECE_BYTES)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._inner.data_received(bytes(self._buffer[:nbytes]))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


def _without_text(record: logging.LogRecord) -> bool:
    """Reduce an exception in aiohttp's log to its type: its text quotes what a client sent.

    A client who has left is no error, and no line.
    """
    if record.exc_info and record.exc_info[0] is not None:
        if issubclass(record.exc_info[0], ConnectionResetError):
            return False
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[0].__name__}", None
        record.exc_info = None
    return True
