"""Random requests over HTTP and gRPC to a gateway in this process, whose one replica is a fake.

They come in as bytes over loopback: the gateway's own servers read them, its `admit` checks them,
and what it lets through reaches the fake replica.
"""

from __future__ import annotations

import asyncio
from random import Random

import grpc
from tritonclient.grpc import service_pb2 as kserve

from integration.fuzz.bodies import generate_body, infer_body, infer_message, packed
from integration.fuzz.target import MAX_S, Case, ServerError
from paraserve_backend.daemon.guard import internal_error
from tests.support.gateway import DEPLOYMENT, GatewayHarness

_SERVICE = "/inference.GRPCInferenceService"
_BROKEN_CODES = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})
_PATHS = (
    "",
    "/ready",
    "/config",
    "/stats",
    "/versions/1/infer",
    "/versions/2/generate",
    "/versions/%00/infer",
    "/generate?x=%FF",
    "/x",
    "/../../v2",
    "/trace/setting",
)
_HEADERS = (
    ("Accept-Encoding", "gzip"),
    ("Accept-Encoding", "deflate;q=0.5, gzip;q=x"),
    ("Accept-Encoding", ",;=,q=;q=1e999"),
    ("Accept-Encoding", "gzip;q=nan, *"),
    ("Content-Type", "text/plain; charset=utf-7"),
    ("Content-Type", "multipart/form-data"),
    ("Content-Encoding", "gzip"),
    ("Content-Encoding", ""),
    ("Inference-Header-Content-Length", "-1"),
    ("Inference-Header-Content-Length", "0x10"),
    ("Inference-Header-Content-Length", "٣"),
    ("Inference-Header-Content-Length", "9" * 5000),
    ("Inference-Header-Content-Length", ""),
    ("Expect", "100-continue"),
    ("X-Odd", "\x80\xff"),
)


class HttpDoor:
    name = "http"

    def __init__(self, harness: GatewayHarness) -> None:
        self._harness = harness
        self._connection: _HttpConnection | None = None

    def case(self, rng: Random) -> Case:
        request = _http_request(rng)
        is_cut = rng.random() < 0.01

        async def run() -> None:
            if is_cut:
                await self._cut(request[: len(request) // 2])
                return
            status, answer = await self._ask(request)
            if status >= 500 and status not in (501, 503, 504):
                raise ServerError(f"HTTP {status}")
            if str(internal_error()).encode() in answer:
                raise ServerError("an internal error in an event stream")

        return Case(shown=repr(request), run=run)

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    async def _ask(self, request: bytes) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = await _HttpConnection.open(self._harness.gateway.http_address)
        status, answer, is_kept = await self._connection.ask(request)
        if not is_kept:
            await self.close()
        return status, answer

    async def _cut(self, request: bytes) -> None:
        """Send a part of a request and leave."""
        connection = await _HttpConnection.open(self._harness.gateway.http_address)
        connection.write(request)
        await connection.close()


class _HttpConnection:
    """Sends bytes that no client library would; reads answers as HTTP/1.1 frames them."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, address: str) -> _HttpConnection:
        host, _, port = address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    async def ask(self, request: bytes) -> tuple[int, bytes, bool]:
        """Return status and body of the answer, and whether the connection is kept."""
        self.write(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        if head.startswith("http/1.1 100"):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        fields = dict(line.split(": ", 1) for line in head.splitlines()[1:] if ": " in line)
        if "chunked" in fields.get("transfer-encoding", ""):
            body = await self._chunks()
        else:
            body = await self._reader.readexactly(int(fields.get("content-length", "0")))
        return int(head.split()[1]), body, fields.get("connection") != "close"

    async def close(self) -> None:
        self._writer.close()
        await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)

    async def _chunks(self) -> bytes:
        body = b""
        while size := int(await self._reader.readline(), 16):
            body += await self._reader.readexactly(size)
            await self._reader.readline()
        await self._reader.readline()
        return body


class GrpcDoor:
    name = "grpc"

    def __init__(self, harness: GatewayHarness) -> None:
        # Of the kind that Triton's clients use; the other one reports some ends of a stream as
        # errors of its own.
        self._channel = grpc.insecure_channel(harness.gateway.grpc_address)
        # Messages are sent and read as bytes.
        self._single = self._channel.unary_unary(f"{_SERVICE}/ModelInfer", bytes, bytes)
        self._stream = self._channel.stream_stream(f"{_SERVICE}/ModelStreamInfer", bytes, bytes)

    def case(self, rng: Random) -> Case:
        is_stream = rng.random() < 0.5
        count = rng.choice((1, 1, 2, 4)) if is_stream else 1
        messages = [infer_message(rng, _model(rng)) for _ in range(count)]
        compression = grpc.Compression.Gzip if rng.random() < 0.1 else None
        metadata = (("triton_grpc_error", "true"),) if rng.random() < 0.2 else ()

        def send() -> None:
            if is_stream:
                self._send_stream(messages, compression, metadata)
            else:
                self._single(messages[0], compression=compression, timeout=MAX_S)

        async def run() -> None:
            try:
                await asyncio.to_thread(send)
            except grpc.RpcError as error:
                _check(error)

        return Case(shown=f"stream={is_stream} {compression} {metadata} {messages!r}", run=run)

    def close(self) -> None:
        self._channel.close()

    def _send_stream(
        self,
        messages: list[bytes],
        compression: grpc.Compression | None,
        metadata: tuple[tuple[str, str], ...],
    ) -> None:
        call = self._stream(
            iter(messages), compression=compression, metadata=metadata, timeout=MAX_S
        )
        for data in call:
            entry = kserve.ModelStreamInferResponse.FromString(data)
            if str(internal_error()) in entry.error_message:
                raise ServerError("an internal error in a stream")


def _check(error: grpc.RpcError) -> None:
    """Raise if the call ended otherwise than with an answer or a refusal."""
    assert isinstance(error, grpc.Call)
    code, details = error.code(), error.details() or ""
    if code in _BROKEN_CODES:
        raise ServerError(f"{code.name}: {details}")
    # The request's own time limit is in microseconds, and is said to be.
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and "microseconds" not in details:
        raise TimeoutError


def _http_request(rng: Random) -> bytes:
    """Return a whole request; its framing is right, but for headers that are odd anyway."""
    call = rng.choice(("generate", "generate", "generate_stream", "infer", "infer", "infer"))
    headers = [("Host", "gateway")]
    if call == "infer":
        made = infer_body(rng)
        body = made.body
        if made.header_bytes is not None:
            headers.append(("Inference-Header-Content-Length", str(made.header_bytes)))
    else:
        body = generate_body(rng)
    if rng.random() < 0.08:
        body, coding = packed(rng, body)
        headers.append(("Content-Encoding", coding))
    if rng.random() < 0.1:
        headers.append(rng.choice(_HEADERS))
    path = f"/{call}" if rng.random() < 0.95 else rng.choice(_PATHS)
    method = "POST" if rng.random() < 0.97 else rng.choice(("GET", "PUT", "OPTIONS"))
    headers.append(("Content-Length", str(len(body))))
    lines = [f"{method} /v2/models/{_model(rng) or 'x'}{path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join(lines).encode("utf-8") + b"\r\n\r\n" + body


def _model(rng: Random) -> str:
    # An unknown one is waited for, in case it is being deployed.
    return DEPLOYMENT if rng.random() < 0.999 else rng.choice(("", "other", "tiny.1"))
