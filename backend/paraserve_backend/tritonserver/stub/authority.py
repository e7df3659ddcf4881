"""Who may command this process: its agent, by the secret that it wrote for it.

Anybody who reaches the server can send a request with any parameter. What is ours and not meant for
clients is refused by its name here.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.names import (
    COMMAND_PARAMETER,
    OWN_PREFIX,
    PROBE_PARAMETER,
    REPLICA_PARAMETER,
    SECRET_PARAMETER,
)
from paraserve_backend.protocol.request_settings import show
from paraserve_backend.protocol.run_dir import RunDir

logger = logging.getLogger(__name__)
_OURS = (PROBE_PARAMETER, REPLICA_PARAMETER, SECRET_PARAMETER)


class Authority:
    """Knows one process's secret; without one nobody commands it."""

    def __init__(self, secret: bytes | None) -> None:
        self._secret = secret or None

    @classmethod
    def of(cls, run_dir: Path | None, model: str) -> Authority:
        """Read what the agent has written for a Triton model; nothing where there is no agent."""
        if run_dir is None:
            return cls(None)
        try:
            return cls(RunDir(run_dir).secret_file(model).read_bytes().strip())
        except FileNotFoundError:
            return cls(None)
        except OSError as error:
            logger.error("the secret of this process cannot be read: %s", error)
            return cls(None)

    def command(self, parameters: Mapping[str, Any], *, has_tensors: bool) -> str | None:
        """Return the command that a request carries; `None` where it carries none.

        Raises:
            InvalidRequest: it has a parameter that is not for whoever sent it.
        """
        for name in parameters:
            if name.startswith(OWN_PREFIX) and name not in _OURS:
                raise _not_for_clients(name)
        command = parameters.get(COMMAND_PARAMETER)
        if command is None:
            self._refuse_rest(parameters, has_tensors=has_tensors)
            return None
        is_meant = isinstance(command, str) and not has_tensors
        if not (is_meant and self._knows(parameters.get(SECRET_PARAMETER))):
            raise _not_for_clients(COMMAND_PARAMETER)
        return str(command)

    def _knows(self, secret: object) -> bool:
        if self._secret is None or not isinstance(secret, str):
            return False
        return hmac.compare_digest(secret.encode(errors="replace"), self._secret)

    def _refuse_rest(self, parameters: Mapping[str, Any], *, has_tensors: bool) -> None:
        if SECRET_PARAMETER in parameters:
            raise _not_for_clients(SECRET_PARAMETER)
        if PROBE_PARAMETER in parameters and (
            has_tensors or parameters[PROBE_PARAMETER] is not True
        ):
            raise _not_for_clients(PROBE_PARAMETER)


def _not_for_clients(name: str) -> InvalidRequest:
    return InvalidRequest(f"Parameter {show(name)} is not for clients; leave it out.")
