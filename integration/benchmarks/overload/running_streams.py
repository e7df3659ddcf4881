"""Streams that run while other things happen to their gateway, in a process of their own.

    python -m integration.benchmarks.overload.running_streams ADDRESS DEPLOYMENT STREAMS TOKENS

A stream that has all its tokens is followed by another one. It prints a line for each token, as it
comes: which stream it is of, and the monotonic time, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path

import grpc.aio
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from integration.benchmarks.overload.client import only, request
from integration.support.limits import HANG_S
from paraserve_backend.rpc.channels import triton_channel


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A span of monotonic time."""

    start_s: float
    end_s: float


@dataclass(slots=True, kw_only=True)
class Tokens:
    """When the tokens of each stream came; it grows while the streams run."""

    log: Path
    _taken: int = 0
    _times_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def per_s(self, window: Window) -> float:
        count = sum(len(times) for times in self._within(window))
        return count / (window.end_s - window.start_s)

    def gaps_s(self, window: Window) -> list[float]:
        """Return the gaps between tokens of a stream, shortest first."""
        return sorted(b - a for times in self._within(window) for a, b in pairwise(times))

    def num_streams(self) -> int:
        """Return how many have begun."""
        self._read()
        return len(self._times_s)

    def _within(self, window: Window) -> list[list[float]]:
        self._read()
        return [
            [at_s for at_s in times if window.start_s <= at_s < window.end_s]
            for times in self._times_s.values()
        ]

    def _read(self) -> None:
        with self.log.open("rb") as log:
            log.seek(self._taken)
            whole = log.read().rpartition(b"\n")[0]
        self._taken += len(whole) + 1 if whole else 0
        for line in whole.decode().splitlines():
            stream, at_s = line.split()
            self._times_s[stream].append(float(at_s))


@contextlib.asynccontextmanager
async def running(
    folder: Path, address: str, deployment: str, *, streams: int, tokens: int
) -> AsyncIterator[Tokens]:
    """Have streams run, each from its first token on, until the end of the body."""
    log, errors = folder / f"streams-{time.monotonic_ns()}", folder / "streams.log"
    command = [sys.executable, "-m", __spec__.name, address, deployment, str(streams), str(tokens)]
    with log.open("wb") as stdout, errors.open("ab") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
    try:
        got, deadline_s = Tokens(log=log), time.monotonic() + HANG_S
        while got.num_streams() < streams:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"The streams did not start: {errors.read_text()[-2000:]}")
            await asyncio.sleep(0.05)
        yield got
        if process.poll() is not None:
            raise RuntimeError(f"The streams ended too soon: {errors.read_text()[-2000:]}")
    finally:
        process.terminate()
        process.wait()


async def _streams(address: str, deployment: str, number: int, tokens: int) -> None:
    async with triton_channel(address) as channel:
        for turn in count():
            await _stream(channel, deployment, f"{number}.{turn}", tokens)


async def _stream(channel: grpc.aio.Channel, deployment: str, name: str, tokens: int) -> None:
    call = GRPCInferenceServiceStub(channel).ModelStreamInfer(
        only(request(deployment, tokens=tokens, is_stream=True))
    )
    async for message in call:
        if message.error_message:
            raise RuntimeError(message.error_message)
        sys.stdout.write(f"{name} {time.monotonic():.6f}\n")
        sys.stdout.flush()


async def _main(address: str, deployment: str, streams: int, tokens: int) -> None:
    await asyncio.gather(
        *(_streams(address, deployment, number, tokens) for number in range(streams))
    )


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
