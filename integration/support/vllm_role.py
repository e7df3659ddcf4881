"""What asks role `generate` with vLLM behind it: also from a script, in a process of its own."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from integration.support.limits import HANG_S
from paraserve_backend.engines.base import LoopState
from paraserve_backend.errors import ParaServeError
from paraserve_backend.generation.answer import Delta
from paraserve_backend.protocol.parameters import GenerateConfig, KvConfig
from paraserve_backend.protocol.request import GenerateRequest
from paraserve_backend.protocol.resume import Resume
from paraserve_backend.protocol.sampling import Sampling
from tests.support.generate_config import make_generate_config, weights_from

PROMPT = [5, 17, 42]


@dataclass(slots=True, eq=False)
class Reply:
    got: queue.SimpleQueue[Delta | ParaServeError | Resume] = field(
        default_factory=queue.SimpleQueue
    )
    cancelled: threading.Event = field(default_factory=threading.Event)

    def send(self, delta: Delta) -> None:
        self.got.put(delta)

    def fail(self, error: ParaServeError) -> None:
        self.got.put(error)

    def move(self, replica: str, resume: Resume) -> None:
        assert replica == "d.2"
        self.got.put(resume)

    def is_cancelled(self) -> bool:
        return self.cancelled.is_set()

    def next(self) -> Delta | ParaServeError | Resume:
        return self.got.get(timeout=HANG_S)

    def answer(self) -> list[int]:
        """Return all tokens until the end."""
        ids: list[int] = []
        while True:
            said = self.next()
            assert isinstance(said, Delta), said
            ids += said.token_ids
            if said.finish_reason is not None:
                return ids


class Gauges:
    def __init__(self) -> None:
        self.states: queue.SimpleQueue[LoopState] = queue.SimpleQueue()

    def update(self, state: LoopState) -> None:
        self.states.put(state)


def request(max_tokens: int, **changes: Any) -> GenerateRequest:
    fields: dict[str, Any] = {
        "text": None,
        "input_ids": tuple(PROMPT),
        "sampling": Sampling(seed=3),
        "max_tokens": max_tokens,
        "is_stream": True,
        **changes,
    }
    return GenerateRequest(**fields)


def config_of(checkpoint: Path) -> GenerateConfig:
    return make_generate_config(
        weights_from(checkpoint),
        kv=KvConfig(num_blocks=64, block_size=16),
        max_context=256,
        max_sequences=8,
    )


def engine_processes(parent: int) -> list[int]:
    """Return the children of `parent` that name themselves an engine."""
    children = Path(f"/proc/{parent}/task").glob("*/children")
    pids = [int(pid) for each in children for pid in each.read_text().split()]
    return [pid for pid in pids if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
