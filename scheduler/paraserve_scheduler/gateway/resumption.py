"""How a request goes on at another replica: what that replica must know.

A replica that hands a request over says how far it has come. For a replica that was lost, this
module knows it from the responses that were sent.
"""

from __future__ import annotations

import struct

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.protocol.request import GenerateRequest, WantedOutputs
from paraserve_backend.protocol.resume import HAND_OVER_TO, RESUME, Resume
from paraserve_backend.protocol.sampling import ChosenToken
from paraserve_scheduler.gateway.kserve.raw_tensors import string_bounds

_IDS = "output_ids"
_ID = struct.Struct("<i")


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
        named = [output.name for output in request.outputs]
        self._can_move = can_move
        self._can_replay = can_move and _can_replay(asked.wanted, named)
        if named and can_move:
            # Triton drops outputs that were not asked for.
            request.outputs.add(name=HAND_OVER_TO)
            request.outputs.add(name=RESUME)
        #: The replica that has been told to go on, if one has.
        self.next_replica: str | None = None
        #: Whether the client has got anything since the last resume, and the raw ids of that.
        self._has_sent = False
        self._sent: list[bytes] = []
        self._resume = Resume(seed=asked.sampling.seed, max_tokens=asked.max_tokens, tokens=())
        self._set(self._resume.encode())

    def receive(self, response: kserve.ModelInferResponse) -> bool:
        """Take in a replica's response; returns whether it is the client's.

        If not, another replica goes on: ask `next_replica`, or any.
        """
        outputs = response.outputs
        if outputs and outputs[0].name == HAND_OVER_TO:
            self._move(response)
            return False
        if self._is_stream and outputs:
            self._has_sent = True
            ids = _raw(response, _IDS)
            self._can_replay &= bool(ids)
            self._sent.append(ids)
        return True

    def lose(self) -> bool:
        """Prepare to go on elsewhere after a loss; returns whether that is possible."""
        self.next_replica = None
        if not self._has_sent:
            return True
        if not self._can_replay:
            return False
        sent = tuple(
            ChosenToken(token_id=token_id, logprob=0.0, ranking=None)
            for raw in self._sent
            for (token_id,) in _ID.iter_unpack(raw)
        )
        known = self._resume
        self._resume = Resume(
            seed=known.seed, max_tokens=known.max_tokens, tokens=(*known.tokens, *sent)
        )
        self._set(self._resume.encode())
        return True

    def _move(self, response: kserve.ModelInferResponse) -> None:
        self.next_replica = _text(response, HAND_OVER_TO)
        encoded = _text(response, RESUME)
        self._resume = Resume.decode(encoded)
        self._set(encoded)

    def _set(self, encoded: str) -> None:
        self._has_sent = False
        self._sent.clear()
        if not self._can_move:
            return
        self._request.parameters[RESUME].string_param = encoded


def _can_replay(wanted: WantedOutputs, named: list[str]) -> bool:
    """Whether all that a next replica must know is in what the client gets."""
    wants_logprobs = wanted.cumulative_logprob or wanted.logprobs or wanted.log_probs
    return not wants_logprobs and (not named or _IDS in named)


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
