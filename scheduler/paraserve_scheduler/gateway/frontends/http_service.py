"""The gateway as Triton's HTTP service: KServe v2 with binary tensors, and the generate calls.

Requests go to `gateway.proxy`, whatever protocol they came by.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from aiohttp import web
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.daemon.guard import internal_error
from paraserve_backend.errors import InvalidRequest, ParaServeError
from paraserve_backend.rpc.errors import Unimplemented
from paraserve_scheduler.gateway.admission import ClientRequest
from paraserve_scheduler.gateway.frontends.failures import RETRY_AFTER, log_failure
from paraserve_scheduler.gateway.frontends.refused_calls import PER_NODE, REPOSITORY, SHARED_MEMORY
from paraserve_scheduler.gateway.kserve import metadata
from paraserve_scheduler.gateway.kserve.compression import (
    Coding,
    accepted_coding,
    pack,
)
from paraserve_scheduler.gateway.kserve.errors import (
    TooLarge,
    UnsupportedCoding,
    client_sentence,
    retry_after_s,
)
from paraserve_scheduler.gateway.kserve.json_codec import generate_response, infer_response
from paraserve_scheduler.gateway.kserve.statistics import Statistics
from paraserve_scheduler.gateway.large_requests import RequestReading
from paraserve_scheduler.gateway.proxy import Proxy
from paraserve_scheduler.gateway.reading import Form, UnreadRequest
from paraserve_scheduler.gateway.routes import Routes

logger = logging.getLogger(__name__)

_HEADER_LENGTH = "Inference-Header-Content-Length"
#: As many as a 64-bit number has.
_MAX_LENGTH_DIGITS = 20
_EVENT_STREAM = "text/event-stream; charset=utf-8"
#: Below it packing costs more than it saves.
_MIN_PACKED_BYTES = 1024
#: Paths of Triton's that a gateway refuses, with what to do instead.
_REFUSED_PATHS = {
    "/v2/repository/models/{model}/{action:load|unload}": REPOSITORY,
    "/v2/{kind:system|cuda}sharedmemory/{rest:.*}": SHARED_MEMORY,
    "/v2/trace/setting": PER_NODE,
    "/v2/models/{model}/trace/setting": PER_NODE,
    "/v2/logging": PER_NODE,
}

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpService:
    def __init__(
        self, proxy: Proxy, routes: Routes, statistics: Statistics, reading: RequestReading
    ) -> None:
        self._proxy = proxy
        self._routes = routes
        self._statistics = statistics
        self._reading = reading

    def application(self) -> web.Application:
        app = web.Application(
            client_max_size=self._reading.max_request_bytes,
            middlewares=[_packed_as_asked, _errors_as_json],
        )
        app.router.add_get("/v2", self._server_metadata)
        app.router.add_get("/v2/health/live", self._live)
        app.router.add_get("/v2/health/ready", self._ready)
        app.router.add_post("/v2/repository/index", self._index)
        app.router.add_get("/v2/models/stats", self._all_statistics)
        for path, sentence in _REFUSED_PATHS.items():
            app.router.add_route("*", path, _refusal(sentence))
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            app.router.add_get(model, self._model_metadata)
            app.router.add_get(f"{model}/config", self._model_config)
            app.router.add_get(f"{model}/ready", self._model_ready)
            app.router.add_get(f"{model}/stats", self._model_statistics)
            app.router.add_post(f"{model}/infer", self._infer)
            app.router.add_post(f"{model}/generate", self._generate)
            app.router.add_post(f"{model}/generate_stream", self._generate_stream)
        return app

    # Triton sends no body; KServe's protocol has one, and KServe's client reads it.
    async def _live(self, request: web.Request) -> web.Response:
        return _json({"live": True})

    async def _ready(self, request: web.Request) -> web.Response:
        is_ready = self._routes.is_known
        status = HTTPStatus.OK if is_ready else HTTPStatus.BAD_REQUEST
        return _json({"ready": is_ready}, status)

    async def _server_metadata(self, request: web.Request) -> web.Response:
        return _json(metadata.server_metadata())

    async def _index(self, request: web.Request) -> web.Response:
        return _json(metadata.model_index(self._routes.deployments))

    async def _model_metadata(self, request: web.Request) -> web.Response:
        return _json(metadata.model_metadata(await self._deployment(request)))

    async def _model_config(self, request: web.Request) -> web.Response:
        return _json(metadata.model_config(await self._deployment(request)))

    async def _model_ready(self, request: web.Request) -> web.Response:
        return _json({"name": await self._deployment(request), "ready": True})

    async def _all_statistics(self, request: web.Request) -> web.Response:
        return _json(self._statistics.report(self._routes.deployments))

    async def _model_statistics(self, request: web.Request) -> web.Response:
        return _json(self._statistics.report([await self._deployment(request)]))

    async def _infer(self, http: web.Request) -> web.Response:
        request = await self._read(http, Form.INFER)
        fields, binary = infer_response(await self._proxy.single(request), request.binary)
        if not binary:
            return _json(fields)
        head = _dumped(fields)
        return web.Response(
            body=head + binary,
            content_type="application/octet-stream",
            headers={_HEADER_LENGTH: str(len(head))},
        )

    async def _generate(self, http: web.Request) -> web.Response:
        request = await self._read(http, Form.GENERATE)
        return _json(generate_response(await self._proxy.single(request)))

    async def _generate_stream(self, http: web.Request) -> web.StreamResponse:
        request = await self._read(http, Form.GENERATE)
        events = _EventStream(http)
        try:
            await self._proxy.stream(request, events.send)
        except ParaServeError as error:
            if not events.is_started:
                raise
            await events.send_error(client_sentence(error))
        except ConnectionResetError:
            logger.info("A client left its event stream.")
        except Exception as error:
            if not events.is_started:
                raise
            log_failure(error)
            await events.send_error(client_sentence(internal_error()))
        return events.response

    async def _read(self, http: web.Request, form: Form) -> ClientRequest:
        deployment, version = _model(http)
        return await self._reading.read(
            UnreadRequest(
                form=form,
                body=await http.read(),
                is_packed=_is_packed(http),
                deployment=deployment,
                version=version,
                header_bytes=_header_bytes(http),
            )
        )

    async def _deployment(self, request: web.Request) -> str:
        deployment, version = _model(request)
        await self._routes.require(deployment, version)
        return deployment


class _EventStream:
    """Server-sent events; the status line waits for the first, so that errors keep their own."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response = web.StreamResponse(
            headers={"Content-Type": _EVENT_STREAM, "Cache-Control": "no-cache"}
        )

    @property
    def is_started(self) -> bool:
        return self.response.prepared

    async def send(self, response: kserve.ModelInferResponse) -> None:
        if not response.outputs:
            return
        await self._send(generate_response(response))

    async def send_error(self, sentence: str) -> None:
        await self._send({"error": sentence})

    async def _send(self, fields: dict[str, object]) -> None:
        if not self.is_started:
            await self.response.prepare(self._request)
        await self.response.write(b"data: " + _dumped(fields) + b"\n\n")


@web.middleware
async def _errors_as_json(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ParaServeError as error:
        return _refused(error)
    except web.HTTPRequestEntityTooLarge:
        return _refused(TooLarge.than(request.client_max_size))
    except web.HTTPException as error:
        return _error(error.status, error.reason)
    except Exception as error:
        log_failure(error)
        return _refused(internal_error())


@web.middleware
async def _packed_as_asked(request: web.Request, handler: _Handler) -> web.StreamResponse:
    response = await handler(request)
    # Triton's client unpacks answers only: an error has to be plain.
    if response.status == HTTPStatus.OK and isinstance(response, web.Response):
        coding = accepted_coding(request.headers.get("Accept-Encoding", ""))
        body = response.body
        if coding is not None and isinstance(body, bytes) and len(body) >= _MIN_PACKED_BYTES:
            response.body = await asyncio.to_thread(pack, body, coding)
            response.headers["Content-Encoding"] = coding
    return response


def _refusal(sentence: str) -> _Handler:
    async def refuse(request: web.Request) -> web.StreamResponse:
        raise Unimplemented(sentence)

    return refuse


def _model(request: web.Request) -> tuple[str, str]:
    return request.match_info["model"], request.match_info.get("version", "")


def _is_packed(request: web.Request) -> bool:
    """Tell whether the body is packed.

    Raises:
        UnsupportedCoding: by something else than gzip or deflate.
    """
    name = request.headers.get("Content-Encoding", "identity").strip().lower()
    if name == "identity" or not request.body_exists:
        return False
    if name not in set(Coding):
        raise UnsupportedCoding(
            f"The request's Content-Encoding is {name[:40]!r}; use gzip, deflate or none."
        )
    return True


def _header_bytes(request: web.Request) -> int | None:
    value = request.headers.get(_HEADER_LENGTH)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= _MAX_LENGTH_DIGITS):
        raise InvalidRequest(f"{_HEADER_LENGTH} must be a number of bytes, not {value[:40]!r}.")
    return int(value)


def _dumped(fields: object) -> bytes:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def _json(fields: object, status: int = HTTPStatus.OK) -> web.Response:
    return web.Response(status=status, body=_dumped(fields), content_type="application/json")


def _refused(error: ParaServeError) -> web.Response:
    response = _error(error.http_status, client_sentence(error))
    after_s = retry_after_s(error)
    if after_s is not None:
        response.headers[RETRY_AFTER] = str(after_s)
    return response


def _error(status: int, sentence: str) -> web.Response:
    return web.Response(
        status=status, body=_dumped({"error": sentence}), content_type="application/json"
    )
