"""A daemon as a process: its settings, its log, and its end on a signal."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from paraserve_backend.daemon.logs import start_logging
from paraserve_backend.daemon.settings import parse_arguments
from paraserve_backend.errors import ParaServeError

Settings = TypeVar("Settings")
Serving = Coroutine[Any, Any, None]


def run_daemon(
    settings: type[Settings],
    serve: Callable[[Settings], Serving],
    argv: Sequence[str],
    *,
    program: str,
) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status.

    Raises:
        InvalidRequest: the settings are wrong.
        ParaServeError: see `serve`.
    """
    config = parse_arguments(settings, argv, program=program)
    start_logging()
    try:
        asyncio.run(_until_signalled(serve(config)))
    except BaseExceptionGroup as group:
        # One task of several failed: a user is told its error as that of any command.
        if isinstance(cause := _only_cause(group), ParaServeError):
            raise cause from None
        raise
    return 0


async def _until_signalled(serving: Serving) -> None:
    """Await `serving`; on a signal cancel it and await its clean-up."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Set, not cancel: a second signal must not break off the clean-up.
        loop.add_signal_handler(number, stop.set)
    running = asyncio.create_task(serving)
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
    running.cancel()
    stopped.cancel()
    try:
        await running
    except asyncio.CancelledError:
        return


def _only_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
