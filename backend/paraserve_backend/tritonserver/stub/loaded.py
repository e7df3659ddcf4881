"""Lets the agent see that a model's process could serve, which Triton 2.51 may fail to notice."""

from __future__ import annotations

import logging

from paraserve_backend.daemon.private_files import write_private
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.parameters import read_config, run_dir_of

logger = logging.getLogger(__name__)


def say_loaded(model_config: str, model: str) -> None:
    """Make a Triton model's file in the run_dir of its agent, if there is one."""
    run_dir = run_dir_of(read_config(model_config))
    if run_dir is None:
        return
    path = run_dir.loaded_file(model)
    try:
        write_private(path, "")
    except (OSError, InvalidRequest) as error:
        logger.warning("%s cannot be made: %s", path, error)
