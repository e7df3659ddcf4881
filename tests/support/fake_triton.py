"""Stands in for the module that exists only inside Triton's Python stub."""

from __future__ import annotations

import json
import queue
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt


class FakeError(Exception):
    INTERNAL, INVALID_ARG, NOT_FOUND, UNAVAILABLE = range(4)
    ALREADY_EXISTS, CANCELLED = range(4, 6)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        super().__init__(message)
        self.code = code


class FakeTensor:
    def __init__(self, name: str, value: npt.NDArray[Any]) -> None:
        self._name = name
        self._value = value

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> npt.NDArray[Any]:
        return self._value


class FakeResponse:
    def __init__(self, output_tensors: object = (), error: FakeError | None = None) -> None:
        self.tensors = output_tensors
        self.said = error


class FakeSender:
    def __init__(self) -> None:
        self.sent: queue.SimpleQueue[tuple[FakeResponse | None, int]] = queue.SimpleQueue()

    def send(self, response: FakeResponse | None = None, flags: int = 0) -> None:
        self.sent.put((response, flags))

    def is_cancelled(self) -> bool:
        return False


class FakeRequest:
    def __init__(
        self,
        inputs: Mapping[str, npt.NDArray[Any]] | None = None,
        parameters: Mapping[str, object] | None = None,
        sender: FakeSender | None = None,
    ) -> None:
        self._inputs = [FakeTensor(name, value) for name, value in (inputs or {}).items()]
        self._parameters = json.dumps(parameters or {})
        self.sender = sender or FakeSender()

    def inputs(self) -> list[FakeTensor]:
        return self._inputs

    def parameters(self) -> str:
        return self._parameters

    def get_response_sender(self) -> FakeSender:
        return self.sender


def make_module() -> ModuleType:
    module = ModuleType("triton_python_backend_utils")
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1  # type: ignore[attr-defined]
    module.TritonError = FakeError  # type: ignore[attr-defined]
    module.Tensor = FakeTensor  # type: ignore[attr-defined]
    module.InferenceResponse = FakeResponse  # type: ignore[attr-defined]
    return module


def words(*values: bytes) -> npt.NDArray[Any]:
    return np.array(values, np.object_)
