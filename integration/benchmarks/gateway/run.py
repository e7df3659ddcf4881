"""What the gateway costs: the same client straight to Triton and through the gateway.

    python -m integration.benchmarks.gateway.run

Per request, and in tokens/s of 1, 16 and 64 streams at once: at the pace of a language model, and
as fast as tokens come. Both ways take turns in one run. Client, gateway, tritonserver and the
counting model are processes that share this machine's cores. The last line is JSON; the exit status
is 1 if a target was missed.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc.aio
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc import service_pb2 as kserve
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from integration.benchmarks.gateway.process import GatewayProcess, gateway_process
from integration.support.counting_model import paced, write_model
from integration.support.triton_server import TritonServer
from paraserve_backend.rpc import paraserve_pb2 as pb

_DEPLOYMENT = "tiny"
_REPLICA = f"{_DEPLOYMENT}.1"
_ROUNDS = 3
_REQUESTS = 400
_RESUMES = 20
#: An answer of usual length, at the pace of a model of some 10 billion parameters.
_PACE_MS = 20
_PACED_TOKENS = 200
#: Of all streams together.
_FLAT_OUT_TOKENS = 9600

MAX_ADDED_P50_MS = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    streams: int
    #: Of each stream.
    tokens: int
    prompt: str


STREAMS = (1, 16, 64)
LOADS: dict[str, Load] = {
    f"paced_{n}": Load(streams=n, tokens=_PACED_TOKENS, prompt=paced(_PACE_MS)) for n in STREAMS
} | {
    f"flat_out_{n}": Load(streams=n, tokens=_FLAT_OUT_TOKENS // n, prompt="count") for n in STREAMS
}
MIN_RATIOS = {f"paced_{n}_ratio": 0.9 for n in STREAMS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Tokens per second, medians over the rounds."""

    direct_per_s: float
    gateway_per_s: float
    #: The median of the rounds' ratios.
    ratio: float
    #: Processor time per token, microseconds.
    gateway_cpu_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    direct_p50_ms: float
    gateway_p50_ms: float
    #: From the scheduler's new table to the answer of a request held for it.
    resume_p50_ms: float
    throughput: Mapping[str, Throughput]

    @property
    def added_p50_ms(self) -> float:
        return self.gateway_p50_ms - self.direct_p50_ms


class Target:
    """One of the two ways to the model."""

    def __init__(self, channel: grpc.aio.Channel, model: str) -> None:
        self._stub = GRPCInferenceServiceStub(channel)
        self._model = model

    async def tokens_per_s(self, load: Load) -> float:
        start_s = time.perf_counter()
        await asyncio.gather(*(self.stream(load.prompt, load.tokens) for _ in range(load.streams)))
        return load.streams * load.tokens / (time.perf_counter() - start_s)

    async def request_s(self) -> float:
        start_s = time.perf_counter()
        await self.stream("count", 1)
        return time.perf_counter() - start_s

    async def stream(self, prompt: str, tokens: int) -> None:
        """Make one request on a stream of its own."""
        responses = 0
        async for message in self._stub.ModelStreamInfer(
            _only(_request(self._model, prompt, tokens))
        ):
            assert not message.error_message, message.error_message
            responses += 1
        assert responses == tokens, f"{responses} responses instead of {tokens}"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, TritonServer(Path(folder)) as server:
        write_model(server.model_repository / _REPLICA)
        InferenceServerClient(server.grpc_address).load_model(_REPLICA)
        figures = asyncio.run(measure(server, Path(folder)))
    result = summary(figures)
    sys.stdout.write(table(figures) + "\n" + json.dumps(result) + "\n")
    return 0 if result["met"] else 1


async def measure(server: TritonServer, folder: Path) -> Figures:
    endpoint = pb.Endpoint(
        replica=_REPLICA, model=_REPLICA, triton_grpc_address=server.grpc_address
    )
    asleep = [f"asleep-{n}" for n in range(_RESUMES)]
    routes = {_DEPLOYMENT: endpoint, **dict.fromkeys(asleep)}
    async with (
        gateway_process(folder, routes) as process,
        grpc.aio.insecure_channel(server.grpc_address) as to_triton,
        grpc.aio.insecure_channel(process.grpc_address) as to_gateway,
    ):
        direct, gateway = Target(to_triton, _REPLICA), Target(to_gateway, _DEPLOYMENT)
        resume_s = [await wake_s(process, to_gateway, routes, name) for name in asleep]
        pairs = [(await direct.request_s(), await gateway.request_s()) for _ in range(_REQUESTS)]
        direct_s, gateway_s = zip(*pairs, strict=True)
        return Figures(
            direct_p50_ms=1e3 * statistics.median(direct_s),
            gateway_p50_ms=1e3 * statistics.median(gateway_s),
            resume_p50_ms=1e3 * statistics.median(resume_s),
            throughput={
                name: await compare(direct, gateway, load, process) for name, load in LOADS.items()
            },
        )


async def compare(
    direct: Target, gateway: Target, load: Load, process: GatewayProcess
) -> Throughput:
    directs, gateways, cpu_s = [], [], 0.0
    for _ in range(_ROUNDS):
        directs.append(await direct.tokens_per_s(load))
        before_s = process.cpu_s()
        gateways.append(await gateway.tokens_per_s(load))
        cpu_s += process.cpu_s() - before_s
    return Throughput(
        direct_per_s=statistics.median(directs),
        gateway_per_s=statistics.median(gateways),
        ratio=statistics.median(b / a for a, b in zip(directs, gateways, strict=True)),
        gateway_cpu_us=1e6 * cpu_s / (_ROUNDS * load.streams * load.tokens),
    )


async def wake_s(
    process: GatewayProcess,
    channel: grpc.aio.Channel,
    routes: dict[str, pb.Endpoint | None],
    deployment: str,
) -> float:
    """Give a deployment at zero its replica while a request is held for it."""
    waiting = asyncio.create_task(Target(channel, deployment).stream("count", 1))
    await process.held(deployment)
    routes[deployment] = routes[_DEPLOYMENT]
    start_s = time.perf_counter()
    await process.publish(routes)
    await waiting
    return time.perf_counter() - start_s


def summary(figures: Figures) -> dict[str, object]:
    """Return the last line. Only the paced loads have a target; docs/benchmarks.md says why."""
    ratios = {f"{name}_ratio": each.ratio for name, each in figures.throughput.items()}
    met = {"added_p50_ms": figures.added_p50_ms <= MAX_ADDED_P50_MS} | {
        name: ratios[name] >= least for name, least in MIN_RATIOS.items()
    }
    return {
        "bench": "gateway",
        "direct_p50_ms": round(figures.direct_p50_ms, 3),
        "gateway_p50_ms": round(figures.gateway_p50_ms, 3),
        "added_p50_ms": round(figures.added_p50_ms, 3),
        "resume_p50_ms": round(figures.resume_p50_ms, 3),
        "tokens_per_s": {
            name: {key: round(value, 3) for key, value in asdict(each).items()}
            for name, each in figures.throughput.items()
        },
        "targets": {"added_p50_ms": MAX_ADDED_P50_MS, **MIN_RATIOS},
        "missed": [name for name, is_met in met.items() if not is_met],
        "met": all(met.values()),
    }


def table(figures: Figures) -> str:
    rows = [
        f"request: direct {figures.direct_p50_ms:.2f} ms, gateway {figures.gateway_p50_ms:.2f} ms "
        f"(+{figures.added_p50_ms:.2f}); held request: {figures.resume_p50_ms:.2f} ms",
        f"{'tokens/s':<12} {'direct':>8} {'gateway':>8} {'ratio':>6} {'gateway CPU/token':>18}",
    ]
    rows += [
        f"{name:<12} {each.direct_per_s:>8.0f} {each.gateway_per_s:>8.0f} {each.ratio:>6.3f} "
        f"{each.gateway_cpu_us:>15.0f} us"
        for name, each in figures.throughput.items()
    ]
    return "\n".join(rows)


async def _only(request: kserve.ModelInferRequest) -> AsyncIterator[kserve.ModelInferRequest]:
    yield request


def _request(model: str, prompt: str, tokens: int) -> kserve.ModelInferRequest:
    request = kserve.ModelInferRequest(model_name=model)
    text = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(prompt.encode())
    limit = request.inputs.add(name="max_tokens", datatype="INT32", shape=[1])
    limit.contents.int_contents.append(tokens)
    stream = request.inputs.add(name="stream", datatype="BOOL", shape=[1])
    stream.contents.bool_contents.append(True)
    return request


if __name__ == "__main__":
    sys.exit(main())
