"""Calls of Triton's gRPC service that a gateway does not offer; each says what to do instead."""

from __future__ import annotations

from tritonclient.grpc import service_pb2 as kserve
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceServicer

from paraserve_backend.rpc.errors import Unimplemented
from paraserve_scheduler.gateway.frontends.failures import Context, abort

REPOSITORY = "Models are not loaded through a gateway: deploy with `paraserve deploy`."
SHARED_MEMORY = "A gateway has no shared memory with its replicas: send tensors inside the request."
PER_NODE = "A gateway has no trace or log settings: set them on the nodes' Triton servers."


class RefusedCalls(GRPCInferenceServiceServicer):
    async def RepositoryModelLoad(
        self, request: kserve.RepositoryModelLoadRequest, context: Context
    ) -> kserve.RepositoryModelLoadResponse:
        await abort(context, Unimplemented(REPOSITORY))

    async def RepositoryModelUnload(
        self, request: kserve.RepositoryModelUnloadRequest, context: Context
    ) -> kserve.RepositoryModelUnloadResponse:
        await abort(context, Unimplemented(REPOSITORY))

    async def SystemSharedMemoryStatus(
        self, request: kserve.SystemSharedMemoryStatusRequest, context: Context
    ) -> kserve.SystemSharedMemoryStatusResponse:
        await abort(context, Unimplemented(SHARED_MEMORY))

    async def SystemSharedMemoryRegister(
        self, request: kserve.SystemSharedMemoryRegisterRequest, context: Context
    ) -> kserve.SystemSharedMemoryRegisterResponse:
        await abort(context, Unimplemented(SHARED_MEMORY))

    async def SystemSharedMemoryUnregister(
        self, request: kserve.SystemSharedMemoryUnregisterRequest, context: Context
    ) -> kserve.SystemSharedMemoryUnregisterResponse:
        await abort(context, Unimplemented(SHARED_MEMORY))

    async def CudaSharedMemoryStatus(
        self, request: kserve.CudaSharedMemoryStatusRequest, context: Context
    ) -> kserve.CudaSharedMemoryStatusResponse:
        await abort(context, Unimplemented(SHARED_MEMORY))

    async def CudaSharedMemoryRegister(
        self, request: kserve.CudaSharedMemoryRegisterRequest, context: Context
    ) -> kserve.CudaSharedMemoryRegisterResponse:
        await abort(context, Unimplemented(SHARED_MEMORY))

    async def CudaSharedMemoryUnregister(
        self, request: kserve.CudaSharedMemoryUnregisterRequest, context: Context
    ) -> kserve.CudaSharedMemoryUnregisterResponse:
        await abort(context, Unimplemented(SHARED_MEMORY))

    async def TraceSetting(
        self, request: kserve.TraceSettingRequest, context: Context
    ) -> kserve.TraceSettingResponse:
        await abort(context, Unimplemented(PER_NODE))

    async def LogSettings(
        self, request: kserve.LogSettingsRequest, context: Context
    ) -> kserve.LogSettingsResponse:
        await abort(context, Unimplemented(PER_NODE))
