"""The files through which the agent and a Triton model's process know each other.

The agent writes a secret, which its commands to the process carry. The process says when it has
loaded, and touches a pulse while its generate loop turns (`protocol.run_dir`).
"""

from __future__ import annotations

import os
import secrets
import shutil

from paraserve_backend.daemon.private_files import write_private
from paraserve_backend.protocol.run_dir import RunDir

_SECRET_BYTES = 32


class RunFiles:
    """By name of a Triton model, which may be a slot's. Blocking, as quick as a file in memory."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._secrets: dict[str, str] = {}

    def prepare(self, model: str) -> None:
        """Give a model that is about to be loaded a secret of its own, and nothing else yet."""
        self.remove(model)
        secret = secrets.token_hex(_SECRET_BYTES)
        write_private(self._run_dir.secret_file(model), secret)
        self._secrets[model] = secret

    def secret(self, model: str) -> str:
        """Return what commands to a model carry; nothing where it takes none."""
        return self._secrets.get(model, "")

    def pulse(self, model: str) -> int | None:
        """Return when the model's loop last beat, or `None` if it has not beaten yet."""
        try:
            return os.stat(self._run_dir.pulse_file(model)).st_mtime_ns
        except OSError:
            return None

    def has_loaded(self, model: str) -> bool:
        """Say whether the model's process could serve, whatever Triton makes of it."""
        return self._run_dir.loaded_file(model).exists()

    def forget_pulse(self, model: str) -> None:
        """Forget the pulse of what the model was until now."""
        self._run_dir.pulse_file(model).unlink(missing_ok=True)

    def remove(self, model: str) -> None:
        """Remove the files of a model that is gone. Missing files are no error."""
        self._secrets.pop(model, None)
        self._run_dir.secret_file(model).unlink(missing_ok=True)
        self._run_dir.loaded_file(model).unlink(missing_ok=True)
        self.forget_pulse(model)

    def clear(self) -> None:
        """Remove everything, also what an earlier agent left."""
        self._secrets.clear()
        for folder in (self._run_dir.secrets, self._run_dir.pulses, self._run_dir.loaded):
            shutil.rmtree(folder, ignore_errors=True)
