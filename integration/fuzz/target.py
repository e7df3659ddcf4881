"""A target makes cases from a random generator; a case raises if something broke."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from paraserve_backend.errors import ParaServeError

#: A machine with other things to do may take its time; an answer that never comes takes longer.
MAX_S = 30.0
#: Refused as it should be: one sentence for the user.
REFUSALS = (ParaServeError,)


class ServerError(Exception):
    """The product answered that it has failed: HTTP's 500, gRPC's INTERNAL or UNKNOWN."""


class WrongAnswer(Exception):
    """Nothing was raised, but what came out is not right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    #: The input, for whoever looks into a finding.
    shown: str
    run: Callable[[], Awaitable[None]]


class Target(Protocol):
    @property
    def name(self) -> str: ...

    def case(self, rng: Random) -> Case:
        """Make one input; equal generators make equal inputs."""
        ...
