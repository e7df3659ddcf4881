"""Reduces what a Triton server says to one sentence for the client; the gateway's own errors.

The sentence has no traceback and no path of the machine it came from.
"""

from __future__ import annotations

import math
import re

from paraserve_backend.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ParaServeError,
    ResourceExhausted,
    Unavailable,
)


class ReplicaRefused(Unavailable):
    """A replica did not take the request at all: another one may."""


class ReplicaLost(Unavailable):
    """A replica died while it had the request."""


class ReplicaFailing(Unavailable):
    """A replica says that it cannot go on with the request."""


class ReplicaSilent(DeadlineExceeded):
    """A replica answers neither the request nor probes."""


class ReplicaLate(DeadlineExceeded):
    """A replica answers probes, but has sent the request nothing for as long as it may."""


class Overloaded(ResourceExhausted):
    """Replicas serve, and as many requests wait for them as may."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoCapacity(Unavailable):
    """No replica serves yet, and as many requests wait for one as may."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooLarge(ParaServeError):
    """A request beyond the gateway's limit, in whatever form it came."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 413

    @classmethod
    def than(cls, limit_bytes: int) -> TooLarge:
        return cls(
            f"The request is larger than the {limit_bytes} bytes this gateway takes, its setting "
            "max_request_bytes; send less."
        )


class TooCostly(ParaServeError):
    """A request within the limit of bytes that takes too much time or memory to read."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 413


class UnsupportedCoding(InvalidRequest):
    """A request packed by something other than gzip or deflate."""

    http_status = 415


_PREFIX = re.compile(
    r"^(?:\[request id: [^\]]*\] )?"
    r"(?:Failed to process the request\(s\) for model (?:instance )?'[^']*', message: )?"
)
_TRACEBACK = re.compile(r"\s*(?:\n\s*At:|Traceback \(most recent call last\)).*", re.DOTALL)
_PATH = re.compile(r"(?:/[\w.+-]+){2,}(?:\(\d+\))?")
_MAX_LENGTH = 500


def client_sentence(error: ParaServeError) -> str:
    """Return what a client is told: printable and short, whatever an error quotes.

    Every error of a request passes here on its way out.
    """
    # Cut twice: a text of millions of characters would take long, and some become longer.
    shown = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode()
        for each in str(error)[: _MAX_LENGTH + 1]
    )
    return shown if len(shown) <= _MAX_LENGTH else f"{shown[: _MAX_LENGTH - 3]}..."


def retry_after_s(error: ParaServeError) -> int | None:
    """Return after how many whole seconds a client should try again; `None` if it is not said."""
    match error:
        case Overloaded() | NoCapacity():
            return max(1, math.ceil(error.retry_after_s))
        case _:
            return None


def clean_message(text: str) -> str:
    """Reduce what a Triton server says to the sentence a user can act on."""
    text = _TRACEBACK.sub("", _PREFIX.sub("", text)).strip()
    first_line = text.partition("\n")[0]
    return _PATH.sub("(path)", first_line)[:_MAX_LENGTH] or "no reason given"
