"""What much and hostile input does to a gateway and to the requests that run.

    python -m integration.benchmarks.overload.run [--quick]

A real tritonserver runs our generate loop over a tiny model whose passes take 25 ms; a gateway runs
in a process of its own; its scheduler is this benchmark. Streams that run, and the requests that
wait beside them, are in different processes. Every ratio is of two measurements of one run. The
last line is JSON; the exit status is 1 if a target was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from integration.benchmarks.gateway.process import GatewayProcess, gateway_process
from integration.benchmarks.overload.client import Crowd, crowd
from integration.benchmarks.overload.hostile_load import Sending, over_grpc, over_http
from integration.benchmarks.overload.paced_model import CONTEXT, PLACES, deployment, load_paced
from integration.benchmarks.overload.running_streams import Tokens, Window, running
from integration.benchmarks.overload.watched_gateway import worst_delay_ms
from integration.support.triton_server import TritonServer
from paraserve_backend.errors import NotFound
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.tritonserver.host.install import find_triton

_PASS_MS = 25
_PACED = deployment(_PASS_MS)
#: As fast as the machine is, for what is not about pace.
_QUICK = deployment(0)
_WAITING = (100, 300, 1000)
_HELD = 10_000
_OVERLOAD = 10
_ANSWER_TOKENS = 20
_STREAM_TOKENS = CONTEXT - 16
#: Sends requests until a moment.
Load = Callable[[float], Awaitable[None]]
#: Measured so often at most: what the code does shows each time, what the machine does does not.
_TRIES = 3
#: A hostile request that takes longer has a line of its own.
_SLOW_S = 5.0

MAX_PAUSE_MS = 50.0
TARGETS: Mapping[str, tuple[str, float]] = {
    **{f"running_ratio_{number}": (">=", 0.9) for number in _WAITING},
    "goodput_ratio_10x": (">=", 0.9),
    "refused_p99_ms": ("<=", 50.0),
    "held_10000_rss_growth_mb": ("<=", 400.0),
    "held_lost": ("<=", 0),
    "loop_pause_ms_http": ("<=", MAX_PAUSE_MS),
    "loop_pause_ms_grpc": ("<=", MAX_PAUSE_MS),
    "stream_gap_p999_ratio": ("<=", 2.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """Seconds of each measurement."""

    running_s: float
    overload_s: float
    gaps_s: float


FULL = Durations(running_s=5.0, overload_s=60.0, gaps_s=30.0)
BRIEF = Durations(running_s=3.0, overload_s=10.0, gaps_s=10.0)


@dataclass(slots=True, kw_only=True)
class Bench:
    """A gateway before a replica of each pace, whose routes the benchmark publishes."""

    gateway: GatewayProcess
    triton_address: str
    socket: Path
    folder: Path
    durations: Durations

    async def serve(self, name: str, *, max_ongoing: int, max_waiting: int = 2 * _HELD) -> None:
        replica = f"{name}.1"
        endpoint = pb.Endpoint(
            replica=replica,
            model=replica,
            triton_grpc_address=self.triton_address,
            max_ongoing=max_ongoing,
        )
        await self._publish(name, [endpoint], max_waiting)

    async def leave_at_zero(self, name: str) -> None:
        await self._publish(name, [], 2 * _HELD)

    async def demand(self, name: str, *, waiting: int | None = None, in_flight: int) -> None:
        """Wait until the gateway has reported that so many wait and run."""
        await self.gateway.scheduler.demand(
            lambda demand: (
                demand.deployment == name
                and waiting in (None, demand.waiting)
                and demand.in_flight == in_flight
            )
        )

    def rss_mb(self) -> float:
        status = Path(f"/proc/{self.gateway.pid}/status").read_text(encoding="ascii")
        (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) / 1024

    async def _publish(self, name: str, endpoints: Sequence[pb.Endpoint], waiting: int) -> None:
        route = pb.Route(
            deployment=name,
            endpoints=endpoints,
            max_waiting=waiting,
            max_context=CONTEXT,
            # No token of the tokenizer is longer than this.
            max_prompt_bytes=CONTEXT * 64,
        )
        await self.gateway.scheduler.publish(route)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="measure each thing for a short time")
    arguments = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        find_triton()
    except NotFound as error:
        return report({}, skipped=str(error))
    with tempfile.TemporaryDirectory() as folder, TritonServer(Path(folder)) as server:
        load_paced(server, Path(folder), _PASS_MS, 0)
        durations = BRIEF if arguments.quick else FULL
        figures = asyncio.run(measure(server, Path(folder), durations))
    return report(figures)


async def measure(server: TritonServer, folder: Path, durations: Durations) -> dict[str, float]:
    socket = folder / "delay.sock"
    command = [
        sys.executable,
        "-m",
        "integration.benchmarks.overload.watched_gateway",
        str(socket),
    ]
    routes = {_PACED: None, _QUICK: None}
    async with gateway_process(folder, routes, command=command) as gateway:
        bench = Bench(
            gateway=gateway,
            triton_address=server.grpc_address,
            socket=socket,
            folder=folder,
            durations=durations,
        )
        figures: dict[str, float] = {}
        for part in (held, running_beside_waiting, overload, hostile):
            found = await part(bench)
            say(f"{part.__name__}: {json.dumps(found)}")
            figures |= found
        return figures


async def held(bench: Bench) -> dict[str, float]:
    """Ten thousand requests wait for a cold start; then all are answered."""
    await bench.leave_at_zero(_QUICK)
    async with crowd(bench.gateway.grpc_address, _QUICK, tokens=1) as warm_up:
        warm_up.send(100)
        await bench.demand(_QUICK, waiting=100, in_flight=0)
    await bench.demand(_QUICK, waiting=0, in_flight=0)
    before_mb = most_mb = bench.rss_mb()
    async with crowd(bench.gateway.grpc_address, _QUICK, tokens=1) as them:
        them.send(_HELD)
        await bench.demand(_QUICK, waiting=_HELD, in_flight=0)
        waiting_mb = most_mb = bench.rss_mb()
        start_s = time.monotonic()
        await bench.serve(_QUICK, max_ongoing=4 * PLACES)
        while them.outcomes.open:
            most_mb = max(most_mb, bench.rss_mb())
            await asyncio.sleep(0.1)
        outcomes = them.outcomes
    for sentence in outcomes.failed[:3]:
        say(f"  lost: {sentence}")
    return {
        "held_10000_rss_growth_mb": round(most_mb - before_mb, 1),
        "held_lost": _HELD - outcomes.answered,
        "held_waiting_mb": round(waiting_mb - before_mb, 1),
        "held_release_s": round(time.monotonic() - start_s, 1),
    }


async def running_beside_waiting(bench: Bench) -> dict[str, float]:
    """Streams run while others wait, in the gateway or inside the replica: the worse of both."""
    ratios: dict[str, float] = {}
    for where, max_ongoing in (("gateway", PLACES), ("replica", 0)):
        await bench.serve(_PACED, max_ongoing=max_ongoing)
        async with running(
            bench.folder,
            bench.gateway.grpc_address,
            _PACED,
            streams=PLACES,
            tokens=_STREAM_TOKENS,
        ) as tokens:
            for number in _WAITING:
                ratio = await _ratio_beside(bench, tokens, number, is_held=where == "gateway")
                ratios[f"running_ratio_{number}_{where}"] = ratio
        await bench.demand(_PACED, waiting=0, in_flight=0)
    worse = {
        f"running_ratio_{number}": min(
            ratios[f"running_ratio_{number}_{where}"] for where in ("gateway", "replica")
        )
        for number in _WAITING
    }
    return {**worse, **ratios}


async def _ratio_beside(bench: Bench, tokens: Tokens, number: int, *, is_held: bool) -> float:
    alone = await _window(bench.durations.running_s)
    async with crowd(bench.gateway.grpc_address, _PACED, tokens=_ANSWER_TOKENS) as waiting:
        waiting.send(number)
        inside = 0 if is_held else number
        await bench.demand(_PACED, waiting=number - inside, in_flight=PLACES + inside)
        beside = await _window(bench.durations.running_s)
    await bench.demand(_PACED, waiting=0, in_flight=PLACES)
    return round(tokens.per_s(beside) / tokens.per_s(alone), 3)


async def _window(duration_s: float) -> Window:
    start_s = time.monotonic()
    await asyncio.sleep(duration_s)
    return Window(start_s=start_s, end_s=time.monotonic())


async def overload(bench: Bench) -> dict[str, float]:
    """Ten times what the replica can do comes: it does what it can, the rest is refused at once."""
    address, duration_s = bench.gateway.grpc_address, bench.durations.overload_s
    await bench.serve(_PACED, max_ongoing=2 * PLACES, max_waiting=4 * PLACES)
    async with crowd(address, _PACED, tokens=_ANSWER_TOKENS) as full:
        capacity = await _tokens_per_s(
            full, min(duration_s, 15.0), lambda until_s: full.keep_open(2 * PLACES, until_s)
        )
    async with crowd(address, _PACED, tokens=_ANSWER_TOKENS) as many:
        offered_per_s = _OVERLOAD * capacity / _ANSWER_TOKENS
        goodput = await _tokens_per_s(
            many, duration_s, lambda until_s: many.at_rate(offered_per_s, until_s)
        )
        outcomes = many.outcomes
    for sentence in outcomes.failed[:3]:
        say(f"  failed: {sentence}")
    refused_ms = [1e3 * each for each in outcomes.refused_s]
    return {
        "goodput_ratio_10x": round(goodput / capacity, 3),
        "refused_p99_ms": round(percentile(refused_ms, 0.99), 1),
        "capacity_tokens_per_s": round(capacity, 1),
        "refused": len(refused_ms),
        "failed": len(outcomes.failed),
    }


async def _tokens_per_s(them: Crowd, duration_s: float, load: Load) -> float:
    """Return what is completed per second while a load lasts, once it has begun well."""
    start_s = time.monotonic()
    loaded = asyncio.ensure_future(load(start_s + duration_s))
    await asyncio.sleep(duration_s / 5)
    before, began_s = them.outcomes.tokens, time.monotonic()
    await asyncio.sleep(start_s + duration_s - began_s)
    rate = (them.outcomes.tokens - before) / (time.monotonic() - began_s)
    await loaded
    return rate


async def hostile(bench: Bench) -> dict[str, float]:
    """The hostile set comes by both protocols, while streams run."""
    await bench.serve(_PACED, max_ongoing=2 * PLACES)
    gateway = bench.gateway
    async with running(
        bench.folder, gateway.grpc_address, _PACED, streams=PLACES // 2, tokens=_STREAM_TOKENS
    ) as tokens:
        alone = await _window(bench.durations.gaps_s)
        start_s = time.monotonic()
        http = await _worst_pause(bench, over_http(gateway.http_address, _PACED))
        grpc = await _worst_pause(bench, over_grpc(gateway.grpc_address, _PACED))
        beside = Window(start_s=start_s, end_s=time.monotonic())
        gaps_ms = [1e3 * percentile(tokens.gaps_s(window), 0.999) for window in (alone, beside)]
    for pause in (http, grpc):
        say(f"  worst pause {pause.worst_ms:.1f} ms: {pause.of}")
    return {
        "loop_pause_ms_http": round(http.worst_ms, 1),
        "loop_pause_ms_grpc": round(grpc.worst_ms, 1),
        "stream_gap_p999_ratio": round(gaps_ms[1] / gaps_ms[0], 3),
        "stream_gap_p999_alone_ms": round(gaps_ms[0], 1),
        "hostile_requests": http.requests + grpc.requests,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    worst_ms: float
    of: str
    requests: int


async def _worst_pause(bench: Bench, sendings: AsyncIterator[Sending]) -> Pause:
    worst_ms, of, requests = 0.0, "none", 0
    async for name, send in sendings:
        requests += 1
        pauses_ms: list[float] = []
        while not pauses_ms or (min(pauses_ms) > MAX_PAUSE_MS and len(pauses_ms) < _TRIES):
            await worst_delay_ms(bench.socket)
            start_s = time.monotonic()
            await send()
            if time.monotonic() - start_s > _SLOW_S:
                say(f"  {name}: {time.monotonic() - start_s:.1f} s")
            pauses_ms.append(await worst_delay_ms(bench.socket))
        if min(pauses_ms) > worst_ms:
            worst_ms, of = min(pauses_ms), name
    return Pause(worst_ms=worst_ms, of=of, requests=requests)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def report(figures: Mapping[str, float], *, skipped: str | None = None) -> int:
    """Write the last line; return the exit status."""
    result = summary(figures, skipped=skipped)
    say(json.dumps(result))
    return 0 if result["met"] else 1


def summary(figures: Mapping[str, float], *, skipped: str | None = None) -> dict[str, object]:
    missed = [name for name in TARGETS if not is_met(name, figures.get(name))]
    result: dict[str, object] = {
        "bench": "overload",
        **figures,
        "targets": {name: f"{sign} {limit:g}" for name, (sign, limit) in TARGETS.items()},
        "missed": missed,
        "met": not missed,
    }
    return result if skipped is None else {**result, "skipped": skipped}


def is_met(name: str, value: float | None) -> bool:
    sign, limit = TARGETS[name]
    if value is None:
        return False
    return value >= limit if sign == ">=" else value <= limit


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
