"""The life of one part: fetch and load at the same time, watch the processes, undo everything.

Whatever ends a part, all that it brought is removed again. Which parts exist, and the order of
commands for them, is decided in `agent.parts.registry`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Set

from paraserve_backend.agent.fetches import Fetching, FetchRequest
from paraserve_backend.agent.parts.models import NodeContext, PartModels
from paraserve_backend.agent.parts.progress import PartProgress, failure_of, first_cause
from paraserve_backend.daemon.tasks import in_thread
from paraserve_backend.errors import DeadlineExceeded, ParaServeError, Unavailable
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.telemetry.spans import SpanName
from paraserve_backend.tritonserver.host.stubs import Stub

logger = logging.getLogger(__name__)

#: A fetch has the same limit as its part and can say what was missing: let it speak first.
_TELL_S = 0.5
#: Triton may still say why a process ended while it loaded, or may never (2.51): wait so long.
_LOSS_TELL_S = 2.0


class PartLife:
    """One part from its start to its removal. Lives on the event loop.

    Making one raises `InvalidRequest` where its fetch plan is malformed.
    """

    def __init__(self, part: pb.Part, node: NodeContext, on_phase: Callable[[], None]) -> None:
        self.progress = PartProgress(part.replica, part.stage, now=node.now, on_phase=on_phase)
        self._part = part
        self._node = node
        self._models = PartModels(part, node, self.progress)
        self._fetch = FetchRequest.from_message(part.fetch) if part.HasField("fetch") else None
        #: Every process that was ever seen to run one of the models.
        self._seen: frozenset[Stub] = frozenset()
        #: Set when a process is lost while the part starts: which, and since when.
        self._lost = asyncio.Event()
        self._lost_model = ""
        self._lost_since_s: float | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        """Whether the part has failed and nothing is left to undo."""
        return self.progress.phase == pb.FAILED and self._task is not None and self._task.done()

    @property
    def triton_models(self) -> frozenset[str]:
        """The Triton models of the part; a slot's, where it stands for one of its own."""
        return self._models.triton_models

    @property
    def loading(self) -> Set[str]:
        """Those that Triton is loading."""
        return self._models.loading

    @property
    def slots(self) -> Mapping[str, str]:
        """The Triton models that some models of the part are instead of one of their own."""
        return self._models.slots

    def start(self) -> None:
        """Begin to fetch and load; `progress` tells the rest."""
        self._task = asyncio.create_task(self._run())

    async def stop(self, deadline_s: float) -> None:
        """Take the part away, whatever it is doing; returns when its memory is free.

        Raises:
            DeadlineExceeded: a process survived; the part is still STOPPING, try again.
        """
        self.progress.move(pb.STOPPING)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._undo(deadline_s)
        self.progress.move(pb.STOPPED)

    def observe(
        self, found: Iterable[Stub], *, triton_live: bool, hung: Set[str] = frozenset()
    ) -> None:
        """Compare with the processes that live now; a part that lost one has failed.

        `hung` are Triton models whose processes are there, but do nothing.
        """
        mine = self._models.stubs(found)
        # By model: a process that forks to run a program is there twice for a moment.
        self._seen |= self._models.slot_stubs
        lost = {stub.model for stub in self._seen} - {stub.model for stub in mine}
        self._seen |= mine
        if self.progress.phase == pb.READY and lost:
            self._fail(Unavailable(self._cause(lost, hung, triton_live=triton_live)))
            self._task = asyncio.create_task(self._clean_up())
        elif self.progress.phase == pb.STARTING and lost:
            self._note_loss(min(map(self._models.name_of, lost)))

    def _cause(self, lost: Set[str], hung: Set[str], *, triton_live: bool) -> str:
        if not triton_live:
            return "Triton stopped."
        # What hangs may have made the others die.
        model = self._models.name_of(min(lost & hung or lost))
        if lost & hung:
            return f"Model {model} has stopped answering."
        return f"The process of model {model} died."

    def _note_loss(self, model: str) -> None:
        now_s = self._node.now()
        if self._lost_since_s is None:
            self._lost_since_s = now_s
        elif now_s - self._lost_since_s >= _LOSS_TELL_S:
            self._lost_model = model
            self._lost.set()

    async def _run(self) -> None:
        limit_s = self._part.fetch.deadline_s or self._node.part_deadline_s
        try:
            async with asyncio.timeout(limit_s + _TELL_S):
                await self._bring_up(limit_s)
        except TimeoutError:
            self._fail(DeadlineExceeded(f"{self._name} was not ready within {limit_s:g} s."))
            await self._clean_up()
        except Exception as error:  # the monitor of this task: a bug, too, ends the part cleanly
            self._fail(first_cause(error))
            await self._clean_up()
        else:
            logger.info("part ready replica=%s stage=%d", self._part.replica, self._part.stage)
            self.progress.move(pb.READY)

    async def _bring_up(self, limit_s: float) -> None:
        with self._node.slots.cold_start():
            async with asyncio.TaskGroup() as group:
                loss = group.create_task(self._fail_at_loss())
                await self._fetch_and_load(limit_s)
                loss.cancel()
        self._seen |= await self._stubs()
        if self._fetch is not None:
            spans = await self._node.fetches.spans(self._fetch.plan.fetch_id)
            self.progress.add_spans(spans)

    async def _fetch_and_load(self, limit_s: float) -> None:
        async with asyncio.TaskGroup() as group:
            if self._fetch is not None:
                # Models look for the fetch when they start, so it must be there before them.
                fetching = await self._node.fetches.start(self._fetch, limit_s)
                group.create_task(self._follow(fetching))
            await self._models.load()

    async def _fail_at_loss(self) -> None:
        await self._lost.wait()
        raise Unavailable(f"The process of model {self._lost_model} died while it loaded.")

    async def _follow(self, fetching: Fetching) -> None:
        fetching.listen(self.progress.fetched)
        with self.progress.span(SpanName.FETCH) as span:
            span.bytes = await fetching.wait()

    async def _stubs(self) -> frozenset[Stub]:
        found = await in_thread(self._node.unloader.stubs.find)
        return self._models.stubs(found)

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, ParaServeError):
            logger.error("part failed replica=%s", self._part.replica, exc_info=error)
        failure = failure_of(error)
        logger.warning(
            "part failed replica=%s stage=%d code=%s reason=%s",
            self._part.replica,
            self._part.stage,
            failure.grpc_code,
            failure.message,
        )
        self.progress.move(pb.FAILED, failure)

    async def _clean_up(self) -> None:
        """Undo after a failure; what cannot be undone now, the removal tries again."""
        try:
            await self._undo(self._node.remove_deadline_s)
        except ParaServeError as error:
            logger.warning("clean-up failed replica=%s reason=%s", self._part.replica, error)

    async def _undo(self, deadline_s: float) -> None:
        # The fetch goes first: a model that waits for its bytes then gives up, and can be unloaded.
        if self._fetch is not None:
            await self._node.fetches.stop(self._fetch.plan.fetch_id)
        await self._models.unload(deadline_s, self._seen)
        await in_thread(lambda: self._models.delete(self._seen))
        if self._fetch is not None:
            await self._node.fetches.release(self._fetch.plan.fetch_id)

    @property
    def _name(self) -> str:
        return f"Stage {self._part.stage} of {self._part.replica}"
