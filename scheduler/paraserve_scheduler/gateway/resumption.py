"""How a request goes on at another replica: what that replica must know.

A replica that hands a request over says how far it has come. For a replica that was lost, this
module knows it from the responses that were sent.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.protocol.request import GenerateRequest
from paraserve_backend.protocol.resume import HAND_OVER_TO, RESUME, Resume
from paraserve_backend.protocol.sampling import ChosenToken
from paraserve_scheduler.gateway.kserve.raw_tensors import string_bounds

_IDS = "output_ids"
_ID = struct.Struct("<i")
#: Outputs with the sum of the log-probabilities so far, under the names of both backends.
_SUMS = ("cumulative_logprob", "cum_log_probs")
_SUM = struct.Struct("<f")


class Resumption:
    """Belongs to one request; changes its message."""

    def __init__(
        self, request: kserve.ModelInferRequest, asked: GenerateRequest, *, can_move: bool = True
    ) -> None:
        """Begin before the first replica.

        Args:
            request: as it goes upstream, already checked.
            asked: what it asks for; its seed is that of all replicas.
            can_move: whether another replica can go on in the middle of the answer.
        """
        self._request = request
        self._is_stream = asked.is_stream
        self._can_move = self._can_replay = can_move
        named = [output.name for output in request.outputs]
        #: The client has named its outputs and left out the ids, which are needed here.
        self._hides_ids = False
        if named and can_move:
            # Triton drops outputs that were not asked for.
            request.outputs.add(name=HAND_OVER_TO)
            request.outputs.add(name=RESUME)
            if asked.is_stream and _IDS not in named:
                self._hides_ids = True
                request.outputs.add(name=_IDS)
        #: The replica that has been told to go on, if one has.
        self.next_replica: str | None = None
        #: Whether a replica has handed it over.
        self.has_moved = False
        #: Whether the client has got anything since the last resume, the raw ids of that, and the
        #: newest sum of log-probabilities.
        self._has_sent = False
        self._sent: list[bytes] = []
        self._sum: float | None = None
        self._resume = Resume(seed=asked.sampling.seed, max_tokens=asked.max_tokens, tokens=())
        self._set(self._resume)

    @property
    def has_begun(self) -> bool:
        """Whether there is anything of an answer yet."""
        return self._has_sent or bool(self._resume.tokens)

    def can_go_on_elsewhere(self) -> bool:
        """Whether the request outlives its replica, so that `lose` returns true."""
        return self._can_replay or not self._has_sent

    def receive(self, response: kserve.ModelInferResponse) -> bool:
        """Take in a replica's response; returns whether it is the client's.

        If not, another replica goes on: ask `next_replica`, or any. An output that only this module
        has asked for is taken out.
        """
        outputs = response.outputs
        if outputs and outputs[0].name == HAND_OVER_TO:
            self._move(response)
            return False
        if self._is_stream and outputs:
            self._note(response)
        return True

    def lose(self) -> bool:
        """Prepare to go on elsewhere after a loss; returns whether that is possible."""
        self.next_replica = None
        if not self._has_sent:
            return True
        if not self._can_replay:
            return False
        known = self._resume
        self._resume = Resume(
            seed=known.seed,
            max_tokens=known.max_tokens,
            tokens=(*known.tokens, *self._tokens_sent()),
        )
        self._set(self._resume)
        return True

    def _note(self, response: kserve.ModelInferResponse) -> None:
        self._has_sent = True
        ids = _raw(response, _IDS)
        self._can_replay &= bool(ids)
        self._sent.append(ids)
        for name in _SUMS:
            raw = _raw(response, name)
            if raw:
                (self._sum,) = _SUM.unpack(raw)
        if self._hides_ids:
            _remove(response, _IDS)

    def _tokens_sent(self) -> Iterator[ChosenToken]:
        """What the client has got since the last resume.

        The next replica needs the log-probabilities of these tokens only for their sum, which the
        newest one therefore has alone: each was sent, and is not sent again.
        """
        ids = [token_id for raw in self._sent for (token_id,) in _ID.iter_unpack(raw)]
        before = sum(token.logprob for token in self._resume.tokens)
        rest = 0.0 if self._sum is None else self._sum - before
        for index, token_id in enumerate(ids, start=1):
            logprob = rest if index == len(ids) else 0.0
            yield ChosenToken(token_id=token_id, logprob=logprob, ranking=None)

    def _move(self, response: kserve.ModelInferResponse) -> None:
        self.next_replica = _text(response, HAND_OVER_TO)
        self.has_moved = True
        self._resume = Resume.decode(_text(response, RESUME))
        self._set(self._resume)

    def _set(self, resume: Resume) -> None:
        self._has_sent = False
        self._sent.clear()
        self._sum = None
        if not self._can_move:
            return
        self._request.parameters[RESUME].string_param = resume.encode()


def _text(response: kserve.ModelInferResponse, name: str) -> str:
    raw = _raw(response, name)
    ((start, end),) = string_bounds(raw)
    return raw[start:end].decode()


def _raw(response: kserve.ModelInferResponse, name: str) -> bytes:
    """The raw contents of an output; empty where it is missing."""
    for index, output in enumerate(response.outputs):
        if output.name == name:
            return response.raw_output_contents[index]
    return b""


def _remove(response: kserve.ModelInferResponse, name: str) -> None:
    for index, output in enumerate(response.outputs):
        if output.name == name:
            del response.outputs[index]
            del response.raw_output_contents[index]
            return
