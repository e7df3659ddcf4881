"""A real tritonserver for tests: started as production starts it, stopped without a trace."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from integration.support.limits import HANG_S
from paraserve_backend.tritonserver.host.install import (
    ServerOptions,
    find_triton,
    launch_command,
    launch_environment,
    prepare_backend_directory,
)
from paraserve_scheduler.local.layout import SHM
from tests.support.ports import free_ports

_HOST = "127.0.0.1"


class TritonServer:
    """One tritonserver with an empty model repository below `folder`; a context manager.

    `options` are added to those of production. Models use the packages beside the interpreter
    `python`, this one by default.
    """

    def __init__(
        self, folder: Path, options: Sequence[str] = (), python: Path | None = None
    ) -> None:
        self.model_repository = folder / "models"
        self.log_path = folder / "triton.log"
        self.shm_prefix = f"paraserve-test-{uuid.uuid4().hex[:8]}-"
        self._backends = folder / "backends"
        self._options = tuple(options)
        self._python = python or Path(sys.executable)
        self._grpc_port, self._http_port, self._metrics_port = free_ports(3)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def grpc_address(self) -> str:
        return f"{_HOST}:{self._grpc_port}"

    @property
    def http_address(self) -> str:
        return f"{_HOST}:{self._http_port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def start(self, *, timeout_s: float = HANG_S) -> None:
        """Start and wait until it answers; the same ports after a `stop`."""
        install = replace(find_triton(), python_path_dir=self._python.parent)
        self.model_repository.mkdir(parents=True, exist_ok=True)
        prepare_backend_directory(self._backends, install)
        options = ServerOptions(
            model_repository=self.model_repository,
            backend_directory=self._backends,
            host=_HOST,
            grpc_port=self._grpc_port,
            http_port=self._http_port,
            metrics_port=self._metrics_port,
            shm_prefix=self.shm_prefix,
        )
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*launch_command(install, options), *self._options],
                env=launch_environment(install, os.environ),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._wait_until_live(timeout_s)

    def stop(self, *, timeout_s: float = 60) -> None:
        """Stop it, by force if need be, and remove what it left in /dev/shm."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        for region in self.shm_regions():
            region.unlink(missing_ok=True)

    def add_backend(self, name: str, code: str) -> None:
        """Give the server a Python-based backend for models that need no file of their own."""
        model = self._backends / name / "model.py"
        model.parent.mkdir()
        model.write_text(code, encoding="utf-8")

    def shm_regions(self) -> list[Path]:
        """Return the shared memory of the server's Python processes."""
        return sorted(SHM.glob(f"{self.shm_prefix}*"))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _wait_until_live(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not _is_live(f"http://{self.http_address}/v2/health/live"):
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.stop()
                raise RuntimeError(f"tritonserver did not start:\n{self.log[-3000:]}")
            time.sleep(0.02)


def _is_live(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
