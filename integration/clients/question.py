"""What every client is asked, and the two things it shall get: an answer, or a look around."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    #: host:port each.
    grpc_address: str
    http_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    deployment: str
    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    token_ids: list[int]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What a client says of a server, of a deployment of it, and of one that is not there."""

    is_server_live: bool
    is_server_ready: bool
    is_deployment_ready: bool
    is_unknown_ready: bool


UNKNOWN = "not-there"

#: Raise the client's own exception if it is refused.
Ask = Callable[[Gateway, Question], Answer]
Look = Callable[[Gateway, str], Sight]
