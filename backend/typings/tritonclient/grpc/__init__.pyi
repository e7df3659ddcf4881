from collections.abc import Callable, Mapping, Sequence

from tritonclient.grpc import model_config_pb2 as model_config_pb2
from tritonclient.grpc import service_pb2 as service_pb2
from tritonclient.grpc import service_pb2_grpc as service_pb2_grpc
from tritonclient.grpc._common import InferInput as InferInput
from tritonclient.grpc._common import InferRequestedOutput as InferRequestedOutput
from tritonclient.grpc._common import InferResult as InferResult
from tritonclient.utils import InferenceServerException as InferenceServerException

class CallContext:
    def cancel(self) -> None: ...

class InferenceServerClient:
    def __init__(
        self,
        url: str,
        verbose: bool = False,
        channel_args: Sequence[tuple[str, int | str]] | None = None,
    ) -> None: ...
    def close(self) -> None: ...
    def is_server_live(self, *, client_timeout: float | None = None) -> bool: ...
    def is_server_ready(self, *, client_timeout: float | None = None) -> bool: ...
    def is_model_ready(
        self, model_name: str, model_version: str = "", *, client_timeout: float | None = None
    ) -> bool: ...
    def get_server_metadata(self) -> service_pb2.ServerMetadataResponse: ...
    def get_model_metadata(
        self, model_name: str, model_version: str = ""
    ) -> service_pb2.ModelMetadataResponse: ...
    def get_model_config(
        self, model_name: str, model_version: str = ""
    ) -> service_pb2.ModelConfigResponse: ...
    def get_model_repository_index(self) -> service_pb2.RepositoryIndexResponse: ...
    def load_model(self, model_name: str, *, client_timeout: float | None = None) -> None: ...
    def unload_model(
        self,
        model_name: str,
        *,
        unload_dependents: bool = False,
        client_timeout: float | None = None,
    ) -> None: ...
    def infer(
        self,
        model_name: str,
        inputs: Sequence[InferInput],
        model_version: str = "",
        outputs: Sequence[InferRequestedOutput] | None = None,
        request_id: str = "",
        *,
        client_timeout: float | None = None,
        parameters: Mapping[str, str | int | bool] | None = None,
    ) -> InferResult: ...
    def async_infer(
        self,
        model_name: str,
        inputs: Sequence[InferInput],
        callback: Callable[[InferResult | None, InferenceServerException | None], None],
        *,
        request_id: str = "",
    ) -> CallContext: ...
    def start_stream(
        self,
        callback: Callable[[InferResult | None, InferenceServerException | None], None],
        stream_timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None: ...
    def stop_stream(self, cancel_requests: bool = False) -> None: ...
    def async_stream_infer(
        self,
        model_name: str,
        inputs: Sequence[InferInput],
        model_version: str = "",
        outputs: Sequence[InferRequestedOutput] | None = None,
        request_id: str = "",
        *,
        enable_empty_final_response: bool = False,
        parameters: Mapping[str, str | int | bool] | None = None,
    ) -> None: ...
