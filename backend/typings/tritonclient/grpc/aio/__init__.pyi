from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Self

from tritonclient.grpc import service_pb2
from tritonclient.grpc._common import InferInput as InferInput
from tritonclient.grpc._common import InferRequestedOutput as InferRequestedOutput
from tritonclient.grpc._common import InferResult as InferResult
from tritonclient.utils import InferenceServerException as InferenceServerException

class ResponseIterator(AsyncIterator[tuple[InferResult | None, InferenceServerException | None]]):
    async def __anext__(self) -> tuple[InferResult | None, InferenceServerException | None]: ...
    def cancel(self) -> bool: ...

class InferenceServerClient:
    def __init__(
        self,
        url: str,
        verbose: bool = False,
        channel_args: Sequence[tuple[str, int | str]] | None = None,
    ) -> None: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, kind: object, value: object, traceback: object) -> None: ...
    async def close(self) -> None: ...
    async def is_server_live(self, *, client_timeout: float | None = None) -> bool: ...
    async def is_server_ready(self, *, client_timeout: float | None = None) -> bool: ...
    async def is_model_ready(
        self, model_name: str, model_version: str = "", *, client_timeout: float | None = None
    ) -> bool: ...
    async def get_server_metadata(self) -> service_pb2.ServerMetadataResponse: ...
    async def get_model_metadata(
        self, model_name: str, model_version: str = ""
    ) -> service_pb2.ModelMetadataResponse: ...
    async def get_model_config(
        self, model_name: str, model_version: str = ""
    ) -> service_pb2.ModelConfigResponse: ...
    async def get_model_repository_index(
        self, *, client_timeout: float | None = None
    ) -> service_pb2.RepositoryIndexResponse: ...
    async def get_inference_statistics(
        self,
        model_name: str = "",
        model_version: str = "",
        *,
        client_timeout: float | None = None,
    ) -> service_pb2.ModelStatisticsResponse: ...
    async def load_model(self, model_name: str, *, client_timeout: float | None = None) -> None: ...
    async def unload_model(
        self,
        model_name: str,
        *,
        unload_dependents: bool = False,
        client_timeout: float | None = None,
    ) -> None: ...
    async def infer(
        self,
        model_name: str,
        inputs: Sequence[InferInput],
        model_version: str = "",
        outputs: Sequence[InferRequestedOutput] | None = None,
        request_id: str = "",
        *,
        sequence_id: int = 0,
        priority: int = 0,
        # Microseconds.
        timeout: int | None = None,
        client_timeout: float | None = None,
        compression_algorithm: str | None = None,
        parameters: Mapping[str, str | int | bool] | None = None,
    ) -> InferResult: ...
    def stream_infer(
        self,
        # The keyword arguments of one `async_stream_infer` of the synchronous client each.
        inputs_iterator: AsyncIterator[dict[str, Any]],
        stream_timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
        compression_algorithm: str | None = None,
    ) -> ResponseIterator: ...
