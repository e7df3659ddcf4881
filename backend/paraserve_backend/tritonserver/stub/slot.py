"""Role `slot` inside Triton: a process that becomes another role when it is told to."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import triton_python_backend_utils as pb_utils

from paraserve_backend.errors import (
    NotFound,
    ParaServeError,
)
from paraserve_backend.protocol.names import (
    REPLICA_PARAMETER,
)
from paraserve_backend.protocol.parameters import (
    SlotConfig,
)
from paraserve_backend.roles.slot import (
    SlotCommand,
    SlotRole,
    import_all,
    read_slot_command,
)

if TYPE_CHECKING:
    pass
from paraserve_backend.tritonserver.stub.model import _adapter
from paraserve_backend.tritonserver.stub.responses import (
    _FINAL,
    _error_response,
    _fail,
    _log,
    _parameters,
)


class _SlotAdapter:
    def __init__(self, config: SlotConfig) -> None:
        import_all(config)
        self._slot = SlotRole(config, _adapter)
        # A command takes as long as a load does; requests are refused meanwhile.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="slot-command")

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> Any:
        answers = [self._answer(request) for request in requests]
        return answers if any(answers) else None

    def _answer(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse | None:
        """Return a response, or `None` where it goes to the request's own sender."""
        parameters = _parameters(request)
        command = read_slot_command(parameters.get("command"))
        if command is not None:
            self._threads.submit(self._obey, command, request.get_response_sender())
            return None
        try:
            with self._slot.use(parameters.get(REPLICA_PARAMETER)) as adapter:
                responses = adapter.execute([request])
        except NotFound as error:
            _fail(request.get_response_sender(), error)
            return None
        return responses[0] if responses else None

    def _obey(self, command: SlotCommand, sender: pb_utils.ResponseSender) -> None:
        response = pb_utils.InferenceResponse([])
        try:
            if command.bind is None:
                self._slot.unbind()
            else:
                self._slot.bind(command.bind)
        except ParaServeError as error:
            response = _error_response(error)
        except Exception as error:
            _log.exception("a slot's command failed")
            response = _error_response(ParaServeError(f"The model failed to load: {error!r}"))
        sender.send(response, flags=_FINAL)

    def close(self) -> None:
        self._threads.shutdown()
        self._slot.unbind()
