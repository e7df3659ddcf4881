"""The class that Triton's Python stub loads: starts a model in its role, answers, ends it.

The backend's one-line model.py imports it. Errors are answered, never raised from `execute`: a stub
that raises leaks shared memory. A dead thread ends the process, so that the agent notices.
"""

from __future__ import annotations

import logging
import os
import threading
from functools import partial
from typing import Any

import triton_python_backend_utils as pb_utils

from paraserve_backend.daemon.logs import start_logging
from paraserve_backend.errors import ParaServeError, coded
from paraserve_backend.protocol.parameters import (
    GenerateConfig,
    RoleConfig,
    SlotConfig,
    StageConfig,
    read_config,
)
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.tritonserver.stub.authority import Authority
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
            self._adapter = _model_adapter(args["model_config"], args["model_name"])
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


def _model_adapter(model_config: str, model: str) -> Adapter:
    config = read_config(model_config)
    if isinstance(config, SlotConfig):
        authority = Authority.of(config.run_dir, model)
        return SlotAdapter(config, partial(_adapter, model=model, authority=authority), authority)
    return _adapter(config, model=model, authority=None)


def _adapter(config: RoleConfig, *, model: str, authority: Authority | None) -> Adapter:
    """Return what answers a model in its role; a slot has an authority of its own."""
    if isinstance(config, GenerateConfig):
        run_dir = config.weights.run_dir
        pulse_file = None if run_dir is None else RunDir(run_dir).pulse_file(model)
        return GenerateAdapter(config, authority or Authority.of(run_dir, model), pulse_file)
    if isinstance(config, StageConfig):
        return StageAdapter(config)
    return LinkAdapter(config)
