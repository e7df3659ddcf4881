"""What the generate loop adds to one decode step of an engine in the same process.

A full instance, a generate role that holds all layers of a tiny model, answers a request; then the
very passes it made are made again by calling the engine. A replayed pass computes the same numbers
and writes the same KV blocks, so the difference is the loop.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from integration.support.checkpoints import LlamaShape, write_raw_bf16
from integration.support.limits import HANG_S
from paraserve_backend.architectures.spec import LayerRange
from paraserve_backend.engines.base import LoopState
from paraserve_backend.engines.native.batcher import ScheduledBatch
from paraserve_backend.engines.native.model.load import load_engine
from paraserve_backend.engines.native.model.stage import StageEngine
from paraserve_backend.errors import ParaServeError
from paraserve_backend.generation.answer import Delta
from paraserve_backend.protocol.forward import ForwardResult
from paraserve_backend.protocol.hand_over import Message
from paraserve_backend.protocol.parameters import GenerateConfig, KvConfig, WeightsConfig
from paraserve_backend.protocol.request import parse_request
from paraserve_backend.protocol.resume import Resume
from paraserve_backend.roles.generate import GenerateRole, LocalForward
from paraserve_backend.roles.weights import open_weights, read_spec
from tests.support.generate_config import make_generate_config

SHAPE = LlamaShape(layers=2, hidden=128, intermediate=256, heads=4, kv_heads=2)
TOKENS = 60
ROUNDS = 16
_KV = KvConfig(num_blocks=64, block_size=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopCost:
    """Seconds of one decode iteration, the median over all."""

    loop_s: float
    engine_s: float

    @property
    def overhead_s(self) -> float:
        return self.loop_s - self.engine_s


def measure() -> LoopCost:
    # A second thread would be worth less than the hand-over to it costs, on so small a model.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_raw_bf16(folder, SHAPE, shard_bytes=1 << 30)
        weights = WeightsConfig(
            run_dir=None, fetch_id=None, source=str(folder), endpoint_url=None, region=None
        )
        fetched = open_weights(weights)
        layers = LayerRange(start=0, end=SHAPE.layers, total=SHAPE.layers)
        engine = load_engine(
            fetched.reader,
            fetched.spans,
            spec=read_spec(fetched),
            layers=layers,
            kv=_KV,
            device="cpu",
        )
        forward = _RecordingForward(engine)
        role = GenerateRole(_config(weights), forward, _NoGauges())
        try:
            return _compare(role, forward, engine)
        finally:
            role.close()
            fetched.close()


def _compare(role: GenerateRole, forward: _RecordingForward, engine: StageEngine) -> LoopCost:
    loops: list[float] = []
    engines: list[float] = []
    for number in range(ROUNDS + 1):
        forward.batches.clear()
        loop_s = _loop_s(role)
        engine_s = _engine_s(engine, forward.batches[1:])  # without the prompt's pass
        if number:  # the first round warms up
            loops += loop_s
            engines += engine_s
    return LoopCost(loop_s=statistics.median(loops), engine_s=statistics.median(engines))


def _loop_s(role: GenerateRole) -> list[float]:
    """Return the seconds from each token sent to the next."""
    reply = _Reply()
    prompt = list(range(1, 17))
    tensors: dict[str, list[int]] = {
        "input_ids": prompt,
        "stream": [True],
        "max_tokens": [TOKENS],
        "ignore_eos": [True],
    }
    role.add(parse_request(tensors, {}, fresh_seed=0), reply)
    if not reply.is_done.wait(HANG_S):
        raise TimeoutError("the loop gave no answer")
    if reply.error is not None:
        raise reply.error
    return [after - before for before, after in pairwise(reply.sent_s)]


def _engine_s(engine: StageEngine, batches: list[ScheduledBatch]) -> list[float]:
    """Return the seconds of each pass."""
    seconds = []
    for batch in batches:
        began = time.perf_counter()
        engine.step(batch.forward, torch.tensor(batch.token_ids, dtype=torch.int32))
        seconds.append(time.perf_counter() - began)
    return seconds


def _nobody(_address: str, _message: Message) -> None:
    raise AssertionError("there is no other replica")


class _RecordingForward(LocalForward):
    """The product's local forward; it keeps the passes to make them again."""

    def __init__(self, engine: StageEngine) -> None:
        super().__init__(engine, _nobody)
        self.batches: list[ScheduledBatch] = []

    def submit(self, batch: ScheduledBatch) -> Future[ForwardResult]:
        self.batches.append(batch)
        return super().submit(batch)


class _Reply:
    def __init__(self) -> None:
        self.sent_s: list[float] = []
        self.is_done = threading.Event()
        self.error: ParaServeError | None = None

    def send(self, delta: Delta) -> None:
        self.sent_s.append(time.perf_counter())
        if delta.finish_reason is not None:
            self.is_done.set()

    def fail(self, error: ParaServeError) -> None:
        self.error = error
        self.is_done.set()

    def move(self, replica: str, resume: Resume) -> None:
        raise AssertionError("there is no other replica")

    def is_cancelled(self) -> bool:
        return False


class _NoGauges:
    def update(self, state: LoopState) -> None:
        pass


def _config(weights: WeightsConfig) -> GenerateConfig:
    return make_generate_config(weights, kv=_KV, max_batch_tokens=512)
