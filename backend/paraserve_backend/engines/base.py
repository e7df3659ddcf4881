"""The interface of an engine that runs a whole model, and of what receives its answers and state.

An engine takes token ids and yields token ids. Text, stop words and the end of an answer are the
business of `generation` and `roles.external`. All methods of an engine run on one event loop.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from paraserve_backend.errors import ParaServeError, ResourceExhausted, Unavailable
from paraserve_backend.generation.answer import Delta
from paraserve_backend.protocol.engine_abilities import Abilities
from paraserve_backend.protocol.resume import Resume
from paraserve_backend.protocol.sampling import ChosenToken, Ranking, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One full instance."""

    #: A Hugging Face model folder: config.json and safetensors files.
    model_dir: Path
    #: As config.json spells it, e.g. "bfloat16".
    dtype: str
    #: "cpu" or "cuda:<index>"; the engine sees no other GPU.
    device: str
    #: Tokens of prompt and answer together.
    max_context: int
    max_sequences: int
    max_batch_tokens: int
    kv_tokens: int
    kv_bytes_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    request_id: str
    #: Never empty; after a hand-over the answer's first tokens are its end.
    prompt_ids: tuple[int, ...]
    #: The engine may stop here; whoever reads its tokens does so in any case.
    max_tokens: int
    min_tokens: int
    #: Likewise. The model's own end tokens count only if they are among these.
    end_ids: frozenset[int]
    #: Penalties and `min_p` are in its `steering`; `banned_ids` and `seen_ids` are not filled in.
    sampling: Sampling
    #: Likeliest tokens to report with each token; 0 reports its own log-probability alone, `None`
    #: not even that.
    num_logprobs: int | None
    #: Whether each token comes with its rank and the likeliest ones.
    is_ranked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    #: Requests in its batch, and requests that wait for a place.
    running: int
    waiting: int
    #: Fraction of the KV cache in use.
    kv_used: float


class EngineDead(Exception):
    """The engine cannot serve any more; its process must be replaced. Never shown to users."""


class Engine(Protocol):
    @property
    def abilities(self) -> Abilities: ...

    async def start(self, settings: EngineSettings) -> None:
        """Load the model; requests may be submitted when it returns.

        Raises:
            ParaServeError: the engine is not installed, or cannot run this model.
        """

    def submit(self, request: EngineRequest) -> AsyncGenerator[Sequence[ChosenToken], None]:
        """Yield the answer's tokens, one or more at a time. Closing the generator cancels it.

        Raises:
            InvalidRequest: the engine refuses the request.
            EngineDead: see there.
        """

    async def stats(self) -> EngineStats: ...

    async def stop(self) -> None:
        """Free everything; called once, whether `start` has succeeded or not."""


class TokenLogprob(Protocol):
    """One candidate for a token, as vLLM and TensorRT-LLM both report it."""

    @property
    def logprob(self) -> float: ...

    @property
    def rank(self) -> int | None: ...


def chosen_token(
    request: EngineRequest, token_id: int, candidates: Mapping[int, TokenLogprob] | None
) -> ChosenToken:
    """Return a token with what `request` wants to know of it.

    Raises:
        Unavailable: the engine has reported no log-probability of it.
    """
    if request.num_logprobs is None:
        return ChosenToken(token_id=token_id, logprob=float("nan"), ranking=None)
    own = (candidates or {}).get(token_id)
    if candidates is None or own is None:
        raise Unavailable("The engine reported no log-probability of a token it has chosen.")
    ranking = None
    if request.is_ranked:
        best = sorted(candidates.items(), key=lambda candidate: -candidate[1].logprob)
        best = best[: request.num_logprobs]
        ranking = Ranking(
            # An engine that leaves the rank out has reported all that are likelier.
            rank=own.rank or 1 + sum(each.logprob > own.logprob for each in candidates.values()),
            token_ids=tuple(candidate_id for candidate_id, _ in best),
            logprobs=tuple(candidate.logprob for _, candidate in best),
        )
    return ChosenToken(token_id=token_id, logprob=own.logprob, ranking=ranking)


class Reply(Protocol):
    """Where one request's answer goes; used by one thread at a time."""

    def send(self, delta: Delta) -> None: ...

    def fail(self, error: ParaServeError) -> None: ...

    def move(self, replica: str, resume: Resume) -> None:
        """End the answer here: that replica goes on with it."""

    def is_cancelled(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopState:
    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    #: Since the start: requests that went to another replica, and KV blocks sent for them.
    requests_moved: int = 0
    kv_blocks_sent_ahead: int = 0
    kv_blocks_sent_held: int = 0


#: Takes what a probe is answered: nothing, or why the replica does not serve.
AnswerProbe = Callable[[ParaServeError | None], None]
#: So many requests may wait in a replica; one more is refused. It is what a gateway may hold for a
#: whole deployment, and a queue of many minutes even for short answers.
MAX_WAITING = 1024


def too_many_wait() -> ResourceExhausted:
    """Return what one request more than may wait is told."""
    return ResourceExhausted(
        f"{MAX_WAITING} requests wait in this replica already; send it again later."
    )


def does_not_return() -> Unavailable:
    """Return what is said of a replica whose engine hangs."""
    return Unavailable("The engine of this replica hangs: a forward pass does not return.")


class Gauges(Protocol):
    """Receives the loop's state after every turn."""

    def update(self, state: LoopState) -> None: ...
