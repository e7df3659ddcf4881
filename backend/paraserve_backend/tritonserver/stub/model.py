"""The class that Triton's Python stub loads: starts a model in its role, answers, ends it.

The backend's one-line model.py imports it. Errors are answered, never raised from `execute`: a stub
that raises leaks shared memory. A dead thread ends the process, so that the agent notices.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

import triton_python_backend_utils as pb_utils

from paraserve_backend.daemon.logs import start_logging
from paraserve_backend.errors import (
    ParaServeError,
    coded,
)
from paraserve_backend.protocol.parameters import (
    GenerateConfig,
    RoleConfig,
    SlotConfig,
    StageConfig,
    read_config,
)
from paraserve_backend.tritonserver.stub.generate import GenerateAdapter
from paraserve_backend.tritonserver.stub.loaded import say_loaded
from paraserve_backend.tritonserver.stub.pipeline import LinkAdapter, StageAdapter
from paraserve_backend.tritonserver.stub.slot import Adapter, SlotAdapter

logger = logging.getLogger(__name__)


class TritonPythonModel:
    """What the stub looks for; one object per model instance."""

    def initialize(self, args: dict[str, str]) -> None:
        start_logging()
        threading.excepthook = _die_loudly
        try:
            self._adapter = _model_adapter(args["model_config"])
        except ParaServeError as error:
            raise pb_utils.TritonModelException(coded(error)) from error
        say_loaded(args["model_config"], args["model_name"])

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> Any:
        return self._adapter.execute(requests)

    def finalize(self) -> None:
        self._adapter.close()
        # Its metrics must go while Triton still takes that: later it is a segmentation fault.
        del self._adapter


def _die_loudly(args: threading.ExceptHookArgs) -> None:
    """A dead thread would hang the clients: leave, so that the agent's watchdog acts."""
    name = args.thread.name if args.thread else "?"
    exc_info = (args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
    logger.critical("thread %s died", name, exc_info=exc_info)
    os._exit(70)


def _model_adapter(model_config: str) -> Adapter:
    config = read_config(model_config)
    return SlotAdapter(config, _adapter) if isinstance(config, SlotConfig) else _adapter(config)


def _adapter(config: RoleConfig) -> Adapter:
    if isinstance(config, GenerateConfig):
        return GenerateAdapter(config)
    if isinstance(config, StageConfig):
        return StageAdapter(config)
    return LinkAdapter(config)
