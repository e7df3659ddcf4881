"""The client of `paraserve generate`, straight at a server."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator

from tritonclient.grpc import service_pb2 as kserve

from paraserve_scheduler.client.generate import Piece, stream
from tests.support.gateway import GatewayHarness, serving
from tests.support.gateway_fakes import Context, answer
from tests.support.limits import HANG_S


async def test_a_stream_that_has_had_its_final_response_is_left_to_end() -> None:
    has_ended = asyncio.Event()

    async def slow_to_end(
        request: kserve.ModelInferRequest, _context: Context
    ) -> AsyncIterator[kserve.ModelInferResponse]:
        yield answer(request, "all", is_final=True)
        # A cancel would come meanwhile, and end this.
        await asyncio.sleep(0.2)
        has_ended.set()

    async with serving() as cluster:
        cluster.triton.script = slow_to_end
        assert [piece.text for piece in await asyncio.to_thread(_ask, cluster)] == ["all"]
        assert has_ended.is_set()
        assert not cluster.triton.cancelled.is_set()


def _ask(cluster: GatewayHarness) -> list[Piece]:
    return list(stream(cluster.addresses[0], "tiny.1", "Once", {}, timeout_s=HANG_S))


#: Argument: an address. Ctrl-C comes when gRPC knows of the call and nobody looks after it yet.
_INTERRUPTED = """
import signal, sys, threading
import grpc._channel
from paraserve_scheduler.client.generate import stream

def interrupt(state, look_after=grpc._channel._run_channel_spin_thread):
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    look_after(state)

grpc._channel._run_channel_spin_thread = interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    list(stream(sys.argv[1], "tiny.1", "Once", {}, timeout_s=300.0))
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_while_the_stream_starts_ends_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()
        ended = subprocess.run(
            [sys.executable, "-c", _INTERRUPTED, f"{host}:{port}"],
            stdout=subprocess.PIPE,
            timeout=HANG_S,
            check=True,
        )
    assert ended.stdout == b"interrupted\n"
