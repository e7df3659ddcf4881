"""The one guard that keeps the failure of one request, or of one frame, from ending the others.

A failure that reaches it is a bug: it is logged with where it happened, and never with what the
exception says, which may quote a prompt or an answer.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from paraserve_backend.errors import ParaServeError


def concerns_one(error: BaseException) -> bool:
    """Tell whether this is a failure of some work, and not the end of its thread.

    A panic inside a package written in Rust is a BaseException of its own.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def internal_error() -> ParaServeError:
    """Return what the client of a request is told that met a bug."""
    return ParaServeError("internal error")


def frames_of(error: BaseException) -> str:
    """Return the lines that an exception came through, without its own words."""
    return "".join(traceback.format_tb(error.__traceback__)).rstrip()


def log_failure(logger: logging.Logger, what: str, error: BaseException) -> None:
    """Log an exception's type and the lines it came through, without its own words."""
    logger.error("%s failed: %s\n%s", what, type(error).__name__, frames_of(error))


@contextmanager
def guarded(
    logger: logging.Logger, what: str, or_else: Callable[[], None] | None = None
) -> Iterator[None]:
    """Do work that concerns one; where it fails, log that and do `or_else`, guarded likewise."""
    try:
        yield
    except BaseException as error:
        if not concerns_one(error):
            raise
        log_failure(logger, what, error)
        if or_else is not None:
            with guarded(logger, f"{what}, to say so,"):
                or_else()
