"""Runs an external engine on an event loop of its own, with one task per request.

It turns our requests into the engine's, looks for cancellations, moves requests to other replicas
by re-prefill, reports the engine's state, and lets the process end when the engine has died.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TypeVar

from paraserve_backend.daemon.guard import concerns_one, guarded, internal_error, log_failure
from paraserve_backend.engines.base import (
    MAX_WAITING,
    AnswerProbe,
    Engine,
    EngineDead,
    EngineRequest,
    EngineSettings,
    Gauges,
    LoopState,
    Reply,
    does_not_return,
    too_many_wait,
)
from paraserve_backend.engines.pass_clock import PassClock
from paraserve_backend.engines.pulse import Pulse
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
    #: Whether the engine has its prompt and no token has come.
    is_prefilling: bool = False

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
#: Asking costs a round trip to the server process: so many requests each time, in turn.
_ASKED_IN_TURN = 80
#: Asking an engine costs milliseconds.
_CHECKS_PER_STATS = 10


Argument = TypeVar("Argument")
#: Ends with what to tell the client, if the answer did not end by itself.
_Task = asyncio.Task[Callable[[], None] | None]


class EngineHost:
    """`add`, `probe`, `set_targets` and `close` may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        settings: EngineSettings,
        gauges: Gauges,
        kv_blocks: int,
        pulse: Pulse,
    ) -> None:
        """Start the engine and wait until it can serve.

        Args:
            engine: used by the loop's thread alone.
            settings: what it shall run.
            gauges: receives the engine's state, from the loop's thread.
            kv_blocks: the whole KV cache, in the gauges' unit.
            pulse: beats while the loop turns and the engine takes its steps.

        Raises:
            ParaServeError: it did not start.
        """
        self._engine = engine
        self._settings = settings
        self._gauges = gauges
        self._kv_blocks = kv_blocks
        self._pulse = pulse
        self._steps = PassClock(time.monotonic)
        #: The step that the engine owes; `None` while it has nothing to do.
        self._step: int | None = None
        #: Of the jobs that have no token yet.
        self._prompt_tokens = 0
        self._most_jobs = settings.max_sequences + MAX_WAITING
        #: In the order in which they are asked whether they are cancelled.
        self._jobs: OrderedDict[Job, _Task] = OrderedDict()
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
        """Take a request in.

        Raises:
            Unavailable: the engine has ended.
        """
        self._call(self._join, job)

    def probe(self, answer: AnswerProbe) -> None:
        """Have the loop itself say whether it turns and the engine takes its steps.

        Raises:
            Unavailable: the engine has ended.
        """
        self._call(self._answer_probe, answer)

    def set_targets(self, targets: tuple[Target, ...]) -> None:
        """Hand all resumable requests over to these replicas, those to come too.

        Raises:
            Unavailable: the engine has ended.
        """
        self._call(self._send_away, targets)

    def _call(self, work: Callable[[Argument], None], argument: Argument) -> None:
        try:
            self._loop.call_soon_threadsafe(work, argument)
        except RuntimeError:  # a loop that has ended takes no calls any more
            raise _unloading() from None

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
            self._pulse.close()
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
            if not self._steps.is_overdue:
                self._pulse.beat()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _CHECK_S)
            for job in list(islice(self._jobs, _ASKED_IN_TURN)):
                self._jobs.move_to_end(job)
                self._look_at(job)
            checks += 1
            if not self._jobs or checks % _CHECKS_PER_STATS == 0:
                await self._report()

    def _look_at(self, job: Job) -> None:
        failed = partial(self._interrupt, job, partial(job.reply.fail, internal_error()))
        with guarded(logger, "a request", failed):
            if job.reply.is_cancelled():
                error = Cancelled("The client cancelled the request.")
                self._interrupt(job, partial(job.reply.fail, error))

    async def _report(self) -> None:
        state = LoopState(requests_moved=self._num_moved)
        if self._jobs:  # what engines say of themselves is a step or two old
            stats = await self._engine.stats()
            state = LoopState(
                running=stats.running,
                waiting=stats.waiting,
                kv_blocks_used=round(stats.kv_used * self._kv_blocks),
                requests_moved=self._num_moved,
            )
        with guarded(logger, "the report of the engine's state"):
            self._gauges.update(state)

    def _answer_probe(self, answer: AnswerProbe) -> None:
        with guarded(logger, "the answer to a probe"):
            answer(does_not_return() if self._steps.is_overdue else None)

    def _join(self, job: Job) -> None:
        with guarded(logger, "a request", partial(job.reply.fail, internal_error())):
            if self._death is not None or self._stopping.is_set():
                job.reply.fail(_unloading())
            elif self._targets and job.is_resumable:
                self._move(job)
            elif len(self._jobs) >= self._most_jobs and not job.tokens:
                job.reply.fail(too_many_wait())
            else:
                self._serve(job)

    def _serve(self, job: Job) -> None:
        self._jobs[job] = task = asyncio.get_running_loop().create_task(self._run_to_end(job))
        task.add_done_callback(partial(self._ended, job))
        self._count_prompt(job, is_done=False)
        self._owe(len(job.request.prompt_ids))

    def _send_away(self, targets: tuple[Target, ...]) -> None:
        self._targets = targets
        if targets:
            for job in list(self._jobs):
                if job.is_resumable:
                    self._interrupt(job, partial(self._move, job))

    def _move(self, job: Job) -> None:
        if not self._targets:  # taken back meanwhile
            job.reply.fail(Unavailable("The request was to move and cannot; send it again."))
            return
        target = self._targets[self._num_moved % len(self._targets)]
        self._num_moved += 1
        job.reply.move(target.replica, job.resume())

    def _interrupt(self, job: Job, end: Callable[[], None]) -> None:
        """Have the engine drop a request; `end` is what its client is told."""
        if job.end is None:
            job.end = end
            self._jobs[job].cancel()

    def _ended(self, job: Job, task: _Task) -> None:
        del self._jobs[job]
        self._count_prompt(job, is_done=True)
        if not self._jobs:
            self._settle_step(is_measure=False)
        # A task that was cancelled before it began has caught nothing.
        end = job.end if task.cancelled() else task.result()
        if end is not None:
            with guarded(logger, "a request", partial(job.reply.fail, internal_error())):
                end()

    async def _run_to_end(self, job: Job) -> Callable[[], None] | None:
        """Stream the answer; returns what to tell the client if that did not end it."""
        try:
            await self._stream(job)
        except asyncio.CancelledError:
            assert job.end is not None, "only _interrupt cancels"
            return job.end
        except ParaServeError as error:
            return partial(job.reply.fail, error)
        except EngineDead as error:
            self._death = error
            self._stopping.set()
            died = Unavailable("The engine has died; send the request again.")
            return partial(job.reply.fail, died)
        except BaseException as error:
            if not concerns_one(error):
                raise
            log_failure(logger, "the engine", error)
            failed = Unavailable("The engine failed on this request; see the server's log.")
            return partial(job.reply.fail, failed)
        return None

    async def _stream(self, job: Job) -> None:
        async with aclosing(self._engine.submit(job.request)) as steps:
            async for tokens in steps:
                self._count_prompt(job, is_done=True)
                self._settle_step(is_measure=True)
                self._owe(len(self._jobs) + self._prompt_tokens)
                if _deliver(job, tokens):
                    return
        raise Unavailable("The engine ended the answer before its time; send the request again.")

    def _owe(self, num_tokens: int) -> None:
        """Expect a step of the engine, in which it may compute so many tokens more."""
        if self._step is None:
            self._step = self._steps.begin(num_tokens)
        else:
            self._steps.enlarge(self._step, num_tokens)

    def _settle_step(self, *, is_measure: bool) -> None:
        if self._step is not None:
            self._steps.end(self._step, is_measure=is_measure)
            self._step = None

    def _count_prompt(self, job: Job, *, is_done: bool) -> None:
        """Follow how many tokens of prompts the engine has still to compute."""
        if job.is_prefilling == is_done:
            job.is_prefilling = not is_done
            num_tokens = len(job.request.prompt_ids)
            self._prompt_tokens += -num_tokens if is_done else num_tokens

    async def _end_all(self) -> None:
        for job in list(self._jobs):
            self._interrupt(job, partial(job.reply.fail, _unloading()))
        await asyncio.gather(*self._jobs.values(), return_exceptions=True)


def _deliver(job: Job, tokens: Sequence[ChosenToken]) -> bool:
    """Send what the newest tokens complete; returns whether the answer has ended.

    Raises:
        ParaServeError: that failed, by no fault of the engine.
    """
    try:
        return job.deliver(tokens)
    except BaseException as error:
        if not concerns_one(error):
            raise
        log_failure(logger, "a request", error)
        raise internal_error() from None


def _unloading() -> Unavailable:
    return Unavailable("The model is being unloaded; send the request again.")
