"""One request on its way through an engine that is not ours.

Which token ends an answer is decided here, by the rule of our own loop (`Sequence.append`), so that
an engine's notion of it never reaches a client.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from paraserve_backend.engines.base import EngineRequest
from paraserve_backend.engines.native.loop import Reply
from paraserve_backend.generation.answer import Answer
from paraserve_backend.generation.sequence import Sequence
from paraserve_backend.protocol.forward import ChosenToken, Steering
from paraserve_backend.protocol.request import GenerateRequest, WantedOutputs
from paraserve_backend.protocol.resume import Resume

_SEED_RANGE = 2**63


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    request: EngineRequest
    sequence: Sequence
    answer: Answer
    reply: Reply
    #: All its tokens so far, for whoever goes on with it.
    tokens: list[ChosenToken]
    #: Whether its sender can follow it to another replica.
    is_resumable: bool
    #: What to tell the client when the engine is stopped before the answer has ended.
    end: Callable[[], None] | None = None

    def deliver(self, tokens: Iterable[ChosenToken]) -> bool:
        """Send what the newest tokens complete; returns whether the answer has ended."""
        for token in tokens:
            self.sequence.append(token.token_id)
            self.tokens.append(token)
            delta = self.answer.add(token, self.sequence.finish_reason)
            if delta is None:
                continue
            self.reply.send(delta)
            if delta.finish_reason is not None:
                return True
        return False

    def resume(self) -> Resume:
        return Resume(
            seed=self.sequence.sampling.seed,
            max_tokens=self.sequence.max_tokens,
            tokens=tuple(self.tokens),
        )


def engine_request(request: GenerateRequest, sequence: Sequence) -> EngineRequest:
    """Return what the engine shall run: the tokens `sequence` has count as prompt."""
    num_done = len(sequence.output_ids)
    steering = request.sampling.steering or Steering()
    num_logprobs = steering.num_logprobs
    if num_logprobs is None and _wants_logprobs(request.wanted):
        num_logprobs = 0
    # With the same seed an engine would repeat the draws it began the answer with.
    sampling = replace(request.sampling, seed=(request.sampling.seed + num_done) % _SEED_RANGE)
    if sampling.top_p == 0.0:
        # The likeliest token alone; engines take this one form of it.
        sampling = replace(sampling, temperature=0.0, top_p=1.0)
    return EngineRequest(
        request_id=uuid.uuid4().hex,
        prompt_ids=(*sequence.prompt_ids, *sequence.output_ids),
        max_tokens=sequence.max_tokens - num_done,
        min_tokens=max(0, min(request.min_tokens, sequence.max_tokens) - num_done),
        end_ids=sequence.end_ids,
        sampling=sampling,
        num_logprobs=num_logprobs,
        is_ranked=steering.num_logprobs is not None,
    )


def _wants_logprobs(wanted: WantedOutputs) -> bool:
    return wanted.cumulative_logprob or wanted.log_probs
