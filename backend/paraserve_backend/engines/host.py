"""Runs an external engine on an event loop of its own, with one task per request.

It turns our requests into the engine's, looks for cancellations, moves requests to other replicas
by re-prefill, reports the engine's state, and lets the process end when the engine has died.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial

from paraserve_backend.engines.base import (
    Engine,
    EngineDead,
    EngineRequest,
    EngineSettings,
    Gauges,
    LoopState,
    Reply,
)
from paraserve_backend.errors import Cancelled, ParaServeError, Unavailable
from paraserve_backend.generation.answer import Answer
from paraserve_backend.generation.sequence import TokenSequence
from paraserve_backend.protocol.hand_over import Target
from paraserve_backend.protocol.request import GenerateRequest, WantedOutputs
from paraserve_backend.protocol.resume import Resume
from paraserve_backend.protocol.sampling import ChosenToken, Steering

_SEED_RANGE = 2**63


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    request: EngineRequest
    sequence: TokenSequence
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


def engine_request(request: GenerateRequest, sequence: TokenSequence) -> EngineRequest:
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


logger = logging.getLogger(__name__)
#: How often cancellation is looked for.
_CHECK_S = 0.1
#: Asking an engine costs milliseconds.
_CHECKS_PER_STATS = 10


class EngineHost:
    """`add`, `set_targets` and `close` may be called from any thread."""

    def __init__(
        self, engine: Engine, settings: EngineSettings, gauges: Gauges, kv_blocks: int
    ) -> None:
        """Start the engine and wait until it can serve.

        Args:
            engine: used by the loop's thread alone.
            settings: what it shall run.
            gauges: receives the engine's state, from the loop's thread.
            kv_blocks: the whole KV cache, in the gauges' unit.

        Raises:
            ParaServeError: it did not start.
        """
        self._engine = engine
        self._settings = settings
        self._gauges = gauges
        self._kv_blocks = kv_blocks
        self._jobs: dict[Job, asyncio.Task[None]] = {}
        self._targets: tuple[Target, ...] = ()
        self._num_moved = 0
        self._death: EngineDead | None = None
        self._stopping = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        try:
            self._started.result()
        except ParaServeError:
            self._thread.join()
            raise

    def add(self, job: Job) -> None:
        self._loop.call_soon_threadsafe(self._join, job)

    def set_targets(self, targets: tuple[Target, ...]) -> None:
        """Hand all resumable requests over to these replicas, those to come too."""
        self._loop.call_soon_threadsafe(self._send_away, targets)

    def close(self) -> None:
        """Stop the engine; whoever is still running gets an error."""
        # A loop that has ended by itself takes no calls any more.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    # ---- the loop's thread ----

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        try:
            if not await self._start():
                return
            await self._watch()
        finally:
            await self._end_all()
            await self._engine.stop()
        if self._death is not None:
            # The process ends with this thread (`tritonserver.stub.model`); the agent replaces it.
            raise self._death

    async def _start(self) -> bool:
        try:
            await self._engine.start(self._settings)
        except ParaServeError as error:
            self._started.set_exception(error)
            return False
        except Exception as error:
            logger.exception("the engine did not start")
            name = self._engine.abilities.name
            self._started.set_exception(
                Unavailable(f"The engine {name} did not start: {type(error).__name__}: {error}")
            )
            return False
        self._started.set_result(None)
        return True

    async def _watch(self) -> None:
        checks = 0
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _CHECK_S)
            for job in list(self._jobs):
                if job.reply.is_cancelled():
                    error = Cancelled("The client cancelled the request.")
                    self._interrupt(job, partial(job.reply.fail, error))
            checks += 1
            if not self._jobs or checks % _CHECKS_PER_STATS == 0:
                await self._report()

    async def _report(self) -> None:
        if not self._jobs:
            # What engines say of themselves is a step or two old.
            self._gauges.update(LoopState(requests_moved=self._num_moved))
            return
        stats = await self._engine.stats()
        self._gauges.update(
            LoopState(
                running=stats.running,
                waiting=stats.waiting,
                kv_blocks_used=round(stats.kv_used * self._kv_blocks),
                requests_moved=self._num_moved,
            )
        )

    def _join(self, job: Job) -> None:
        if self._death is not None or self._stopping.is_set():
            job.reply.fail(_unloading())
        elif self._targets and job.is_resumable:
            self._move(job)
        else:
            self._jobs[job] = asyncio.get_running_loop().create_task(self._serve(job))

    def _send_away(self, targets: tuple[Target, ...]) -> None:
        self._targets = targets
        if targets:
            for job in list(self._jobs):
                if job.is_resumable:
                    self._interrupt(job, partial(self._move, job))

    def _move(self, job: Job) -> None:
        target = self._targets[self._num_moved % len(self._targets)]
        self._num_moved += 1
        job.reply.move(target.replica, job.resume())

    def _interrupt(self, job: Job, end: Callable[[], None]) -> None:
        """Have the engine drop a request; `end` is what its client is told."""
        if job.end is None:
            job.end = end
            self._jobs[job].cancel()

    async def _serve(self, job: Job) -> None:
        try:
            await self._stream(job)
        except asyncio.CancelledError:
            assert job.end is not None, "only _interrupt cancels"
            job.end()
        except ParaServeError as error:
            job.reply.fail(error)
        except EngineDead as error:
            job.reply.fail(Unavailable("The engine has died; send the request again."))
            self._death = error
            self._stopping.set()
        except Exception:
            logger.exception("the engine failed on a request")
            job.reply.fail(Unavailable("The engine failed on this request; see the server's log."))
        finally:
            del self._jobs[job]

    async def _stream(self, job: Job) -> None:
        async with aclosing(self._engine.submit(job.request)) as steps:
            async for tokens in steps:
                if job.deliver(tokens):
                    return
        raise Unavailable("The engine ended the answer before its time; send the request again.")

    async def _end_all(self) -> None:
        for job in list(self._jobs):
            self._interrupt(job, partial(job.reply.fail, _unloading()))
        await asyncio.gather(*self._jobs.values())


def _unloading() -> Unavailable:
    return Unavailable("The model is being unloaded; send the request again.")
