"""At which replicas one request is tried, and which requests are tried no more.

A request may be what kills the replicas that get it. So it is given to at most two that die with
it, and is then refused for a while, whoever sends it. Pure but for the hash of a request.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, replace

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import ParaServeError
from paraserve_backend.protocol.request import GenerateRequest
from paraserve_backend.rpc.errors import error_from_code
from paraserve_scheduler.gateway.kserve.errors import (
    ReplicaFailing,
    ReplicaLate,
    ReplicaLost,
    ReplicaRefused,
    ReplicaSilent,
)

_MAX_DEATHS = 2
_MAX_REFUSALS = 3
#: Of replicas that fell silent with it: who makes one hang may make the next one hang.
_MAX_SILENCES = 3
_MAX_LATE = 1
_REFUSED_S = 60.0
_MAX_KEPT = 1024
_PROMPT = frozenset({"text_input", "input_ids"})


class Deadly(ParaServeError):
    """A request that replicas have died with."""

    def __init__(self, deployment: str) -> None:
        super().__init__(
            f"{_MAX_DEATHS} replicas of '{deployment}' failed while they had this request, so no "
            f"other one gets it, and for {_REFUSED_S:g} s the same request is refused."
        )


class Attempts:
    """Belongs to one request: how often it was lost, and how."""

    def __init__(self, deployment: str) -> None:
        self._deployment = deployment
        self._deaths = 0
        self._refusals = 0
        self._silences = 0
        self._late = 0
        #: Replicas that must not get it again.
        self.refused: frozenset[str] = frozenset()
        #: One that it goes back to only for want of any other.
        self.avoided: str | None = None

    @property
    def is_resumed(self) -> bool:
        """Whether a replica has had it."""
        return bool(self._deaths or self._silences or self._late or self.refused)

    @property
    def is_deadly(self) -> bool:
        return self._deaths >= _MAX_DEATHS

    def failed(self, replica: str, error: ParaServeError) -> None:
        """Note how the request was lost; raises the error if it is not to be tried again."""
        self.avoided = None
        match error:
            case ReplicaLost():
                self._deaths += 1
                self.refused |= {replica}
            case ReplicaFailing():
                self._deaths += 1
                self.avoided = replica
            case ReplicaSilent():
                self._silences += 1  # it gets no request anyhow, until it answers again
            case ReplicaLate():
                self._late += 1
                self.refused |= {replica}
            case ReplicaRefused():
                self._refusals += 1
                self.refused |= {replica}
        if self.is_deadly:
            raise Deadly(self._deployment) from None
        if (
            self._refusals >= _MAX_REFUSALS
            or self._silences >= _MAX_SILENCES
            or self._late > _MAX_LATE
        ):
            raise error

    def shown(self, error: ParaServeError) -> ParaServeError:
        """Return an error as the client gets it: who has seen a death is not told to try again."""
        if not self._deaths or "retry" not in str(error):
            return error
        return error_from_code(
            error.grpc_code,
            f"A replica of '{self._deployment}' failed while it had this request, and no other "
            "one could go on with it.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What makes two requests the same: all but their seed, their id and how far they have come."""

    message: kserve.ModelInferRequest
    #: Without the prompt, which the message has.
    settings: GenerateRequest

    @classmethod
    def of(cls, message: kserve.ModelInferRequest, asked: GenerateRequest) -> Content:
        sampling = replace(asked.sampling, seed=0)
        settings = replace(asked, text=None, input_ids=None, sampling=sampling)
        return cls(message=message, settings=settings)

    def digest(self) -> bytes:
        hashed = hashlib.blake2b(digest_size=16)
        hashed.update(f"{self.message.model_name}\n{self.settings!r}\n".encode())
        for index, tensor in enumerate(self.message.inputs):
            if tensor.name in _PROMPT:
                hashed.update(tensor.SerializeToString(deterministic=True))
                if index < len(self.message.raw_input_contents):
                    hashed.update(self.message.raw_input_contents[index])
        return hashed.digest()


class DeadlyRequests:
    """Those that are refused now, oldest first."""

    def __init__(self) -> None:
        self._until_s: OrderedDict[bytes, float] = OrderedDict()

    def add(self, content: Content, now_s: float) -> None:
        digest = content.digest()
        self._until_s[digest] = now_s + _REFUSED_S
        self._until_s.move_to_end(digest)
        if len(self._until_s) > _MAX_KEPT:
            self._until_s.popitem(last=False)

    def require_harmless(self, content: Content, now_s: float) -> None:
        """Raise Deadly for a request that replicas have died with a short time ago."""
        while self._until_s and next(iter(self._until_s.values())) <= now_s:
            self._until_s.popitem(last=False)
        # Usually there is none, and nothing is hashed.
        if self._until_s and content.digest() in self._until_s:
            raise Deadly(content.message.model_name)
