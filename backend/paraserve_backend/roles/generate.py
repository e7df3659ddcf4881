"""Role `generate` with our own engine: text in, tokens out, for all requests of a replica at once.

In a pipeline, a forward pass is a call of the ensemble. A replica of one stage holds all layers in
this process, and its token loop makes no Triton calls.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paraserve_backend.architectures.spec import LayerRange, ModelSpec
from paraserve_backend.architectures.tensors import kv_bytes_per_token
from paraserve_backend.channel.mailbox import open_mailbox
from paraserve_backend.engines.base import AnswerProbe, Gauges, Reply
from paraserve_backend.engines.native.batcher import (
    Batcher,
    BatchingLimits,
    BlockPool,
    ScheduledBatch,
)
from paraserve_backend.engines.native.handover_source import HandOverSource
from paraserve_backend.engines.native.handover_target import HandOverTarget, Write
from paraserve_backend.engines.native.loop import Forward, GenerateLoop, Request
from paraserve_backend.engines.pulse import Pulse
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.generation.encoder import RequestEncoder
from paraserve_backend.generation.text import read_tokenizer
from paraserve_backend.protocol.forward import ForwardResult
from paraserve_backend.protocol.hand_over import SendMessage, Target
from paraserve_backend.protocol.parameters import GenerateConfig, KvConfig
from paraserve_backend.protocol.request import GenerateRequest
from paraserve_backend.protocol.resume import Resume
from paraserve_backend.roles.weights import Fetched, open_weights, read_spec
from paraserve_backend.telemetry.spans import SpanName

if TYPE_CHECKING:
    from paraserve_backend.engines.native.model.stage import StageEngine


class GenerateRole:
    def __init__(
        self,
        config: GenerateConfig,
        forward: Forward | None,
        gauges: Gauges,
        pulse_file: Path | None = None,
    ) -> None:
        """Load what the role needs.

        Args:
            config: of the model.
            forward: `None` when it holds the layers itself.
            gauges: receives the loop's state.
            pulse_file: what the loop touches while it turns; `None`: there is no agent to look.
        """
        self._fetched = fetched = open_weights(config.weights)
        spec = read_spec(fetched)
        max_context = min(config.max_context or spec.context_length, spec.context_length)
        kv = _sized(config.kv, max_context, config.max_sequences)
        assert kv.num_blocks is not None
        self._encoder = RequestEncoder(
            tokenizer=read_tokenizer(
                fetched.file("tokenizer.json"), fetched.json("tokenizer_config.json")
            ),
            vocab_size=spec.vocab_size,
            end_ids=frozenset(i for i in spec.eos_token_ids if i < spec.vocab_size),
            max_context=min(max_context, kv.num_blocks * kv.block_size),
        )
        self._mailbox = open_mailbox(config.hand_over)
        write = None
        if forward is None:
            forward = _local_forward(fetched, spec, kv, config.device, self._mailbox.send)
            write = forward.write
        pool = BlockPool(kv.num_blocks)
        handover_source = HandOverSource(
            self._mailbox.send,
            inbox=self._mailbox.address,
            block_size=kv.block_size,
            block_bytes=kv.block_size * kv_bytes_per_token(spec, _whole(spec)),
            num_layers=spec.num_layers,
            now_s=time.monotonic,
        )
        handover_target = HandOverTarget(pool, write, self._mailbox.send, time.monotonic)
        limits = BatchingLimits(
            max_sequences=config.max_sequences,
            max_batch_tokens=config.max_batch_tokens,
            batches_in_flight=config.batches_in_flight,
            block_size=kv.block_size,
        )
        self._loop = GenerateLoop(
            Batcher(limits, pool, handover_source.exports),
            forward,
            gauges,
            config.batches_in_flight,
            handover_source=handover_source,
            handover_target=handover_target,
            pulse=Pulse(pulse_file),
        )
        self._mailbox.start(self._loop.receive, handover_target.received)

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together."""
        return self._encoder.max_context

    def add(self, request: GenerateRequest, reply: Reply, resume: Resume | None = None) -> None:
        """Take a request in; its answer goes to `reply` from the loop's thread.

        Args:
            request: what the client asked for.
            reply: where the answer goes.
            resume: how far it has come elsewhere; the answer goes on from there, and may be handed
                over to another replica. `None`: nobody could follow it.

        Raises:
            InvalidRequest: the prompt is empty, too long, or a token is unknown.
        """
        if resume is None:
            sequence = self._encoder.sequence(request)
        else:
            sequence = self._encoder.resumed(request, resume)
        answer = self._encoder.answer(request, sequence.prompt_ids)
        tokens = list(resume.tokens) if resume else []
        answer.replay(tokens)
        self._loop.add(
            Request(
                sequence=sequence,
                answer=answer,
                reply=reply,
                tokens=tokens,
                is_resumable=resume is not None,
                ticket=resume.ticket if resume else 0,
            )
        )

    def probe(self, answer: AnswerProbe) -> None:
        """Have the generate loop itself say whether it turns."""
        self._loop.probe(answer)

    def hand_over(self, targets: tuple[Target, ...]) -> None:
        """Hand all resumable requests over to these replicas, those to come too.

        Raises:
            InvalidRequest: nobody could answer this replica.
        """
        if not self._mailbox.address:
            raise InvalidRequest("A replica without parameter 'hand_over' keeps its requests.")
        self._loop.set_targets(targets)

    def close(self) -> None:
        self._mailbox.stop()
        self._loop.close()
        self._mailbox.close()
        self._fetched.close()


class LocalForward:
    """All layers in this process: passes run one after another on a thread of their own."""

    def __init__(self, engine: StageEngine, send: SendMessage) -> None:
        from paraserve_backend.engines.native.model.kv_transfer import KvExporter, KvImporter

        cache = engine.model.kv_cache
        self._engine = engine
        self._exporter = KvExporter(cache, engine.model.layers, send)
        #: Puts KV blocks of another replica into the cache.
        self.write: Write = KvImporter(cache).write
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def submit(self, batch: ScheduledBatch) -> Future[ForwardResult]:
        return self._thread.submit(self._step, batch)

    def _step(self, batch: ScheduledBatch) -> ForwardResult:
        token_ids = np.array(batch.token_ids, np.int32)
        result = self._engine.step_raw(batch.forward, token_ids)
        assert isinstance(result, ForwardResult)
        self._exporter.send(batch.forward.exports)
        return result

    def close(self) -> None:
        self._thread.shutdown()


def _sized(kv: KvConfig, max_context: int, max_sequences: int) -> KvConfig:
    """A standalone instance gets room for all its sequences at full length."""
    if kv.num_blocks is not None:
        return kv
    blocks = max_sequences * -(-max_context // kv.block_size)
    return KvConfig(num_blocks=blocks, block_size=kv.block_size)


def _local_forward(
    fetched: Fetched, spec: ModelSpec, kv: KvConfig, device: str, send: SendMessage
) -> LocalForward:
    # The head of a pipeline must not pay for it.
    with fetched.spans.span(SpanName.IMPORT_TORCH):
        from paraserve_backend.engines.native.model.load import load_engine

    engine = load_engine(
        fetched.reader, fetched.spans, spec=spec, layers=_whole(spec), kv=kv, device=device
    )
    return LocalForward(engine, send)


def _whole(spec: ModelSpec) -> LayerRange:
    return LayerRange(start=0, end=spec.num_layers, total=spec.num_layers)
