# Calls that the synchronous client makes and the asyncio client awaits.
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

class InferInput:
    def __init__(self, name: str, shape: list[int], datatype: str) -> None: ...
    def set_data_from_numpy(self, input_tensor: np.ndarray[Any, Any]) -> InferInput: ...

class InferRequestedOutput:
    def __init__(self, name: str, class_count: int = 0) -> None: ...

class InferResult:
    # None when the response has no such output.
    def as_numpy(self, name: str) -> np.ndarray[Any, Any] | None: ...
    def get_response(self) -> service_pb2.ModelInferResponse: ...
