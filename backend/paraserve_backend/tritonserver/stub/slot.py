"""Role `slot` inside Triton: carries out commands to bind and unbind, and passes requests on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import triton_python_backend_utils as pb_utils

from paraserve_backend.daemon.guard import guarded
from paraserve_backend.errors import ParaServeError
from paraserve_backend.protocol.names import REPLICA_PARAMETER
from paraserve_backend.protocol.parameters import RoleConfig, SlotConfig
from paraserve_backend.roles.slot import (
    SlotCommand,
    SlotRole,
    import_all,
    read_slot_command,
)
from paraserve_backend.tritonserver.stub.authority import Authority
from paraserve_backend.tritonserver.stub.requests import request_parameters, shown
from paraserve_backend.tritonserver.stub.responses import FINAL, fail

logger = logging.getLogger(__name__)


class Adapter(Protocol):
    """What answers the requests of one model, whatever its role."""

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> Any: ...

    def close(self) -> None: ...


class SlotAdapter:
    """`build` makes the adapter of the role that the slot is bound as."""

    def __init__(
        self, config: SlotConfig, build: Callable[[RoleConfig], Adapter], authority: Authority
    ) -> None:
        import_all(config)
        self._authority = authority
        self._slot = SlotRole(config, build)
        # A command takes as long as a load does; requests are refused meanwhile.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="slot-command")

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> Any:
        answers = [self._answer(request) for request in requests]
        return answers if any(answers) else None

    def _answer(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse | None:
        """Return a response, or `None` where it goes to the request's own sender."""
        with guarded(logger, "a request"):
            try:
                return self._take(request)
            except BaseException as error:
                fail(request.get_response_sender(), shown(error, "a request"))
        return None

    def _take(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse | None:
        parameters = request_parameters(request)
        command = self._authority.command(parameters, has_tensors=bool(request.inputs()))
        own = read_slot_command(command)
        if own is not None:
            self._threads.submit(self._obey, own, request.get_response_sender())
            return None
        with self._slot.use(parameters.get(REPLICA_PARAMETER)) as adapter:
            responses = adapter.execute([request])
        return responses[0] if responses else None

    def _obey(self, command: SlotCommand, sender: pb_utils.ResponseSender) -> None:
        with guarded(logger, "a slot's command"):
            try:
                if command.bind is None:
                    self._slot.unbind()
                else:
                    self._slot.bind(command.bind)
            except ParaServeError as error:
                fail(sender, error)
            except Exception as error:
                logger.exception("a slot's command failed")
                fail(sender, ParaServeError(f"The model failed to load: {error!r}"))
            else:
                sender.send(pb_utils.InferenceResponse([]), flags=FINAL)

    def close(self) -> None:
        self._threads.shutdown()
        self._slot.unbind()
