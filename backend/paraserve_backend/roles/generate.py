"""Role `generate`: text in, tokens out, for all requests of a replica at once.

While the replica is a pipeline a forward pass is a call of the ensemble; a replica of one stage
holds all layers in this process and no Triton call is left in the token loop.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from paraserve_backend.config import GenerateConfig, KvConfig
from paraserve_backend.contract import LayerRange
from paraserve_backend.encoding import RequestEncoder
from paraserve_backend.engine.batch import ForwardResult
from paraserve_backend.engine.batching import Batcher, BatchingLimits, ScheduledBatch
from paraserve_backend.engine.block_pool import BlockPool
from paraserve_backend.engine.loop import Forward, Gauges, GenerateLoop, Reply, Request
from paraserve_backend.families.spec import ModelSpec
from paraserve_backend.request import GenerateRequest
from paraserve_backend.roles.fetched import Fetched, open_weights, read_spec
from paraserve_backend.text import read_tokenizer

if TYPE_CHECKING:
    from paraserve_backend.engine.stage import StageEngine


class GenerateRole:
    def __init__(self, config: GenerateConfig, forward: Forward | None, gauges: Gauges) -> None:
        """Load what the role needs; `forward` is `None` when it holds the layers itself."""
        self._fetched = fetched = open_weights(config.weights)
        spec = read_spec(fetched)
        max_context = min(config.max_context or spec.context_length, spec.context_length)
        kv = _sized(config.kv, max_context, config.max_sequences)
        assert kv.num_blocks is not None
        self._encoder = RequestEncoder(
            tokenizer=read_tokenizer(fetched.file("tokenizer.json")),
            vocab_size=spec.vocab_size,
            end_ids=frozenset(i for i in spec.eos_token_ids if i < spec.vocab_size),
            max_context=min(max_context, kv.num_blocks * kv.block_size),
        )
        self._loop = GenerateLoop(
            Batcher(
                BatchingLimits(
                    max_sequences=config.max_sequences,
                    max_batch_tokens=config.max_batch_tokens,
                    batches_in_flight=config.batches_in_flight,
                    block_size=kv.block_size,
                ),
                BlockPool(kv.num_blocks),
            ),
            forward or _local_forward(fetched, spec, kv, config.device),
            gauges,
            config.batches_in_flight,
        )

    def add(self, request: GenerateRequest, reply: Reply) -> None:
        """Take a request in; its answer goes to `reply` from the loop's thread.

        Raises:
            InvalidRequest: the prompt is empty, too long, or a token is unknown.
        """
        sequence = self._encoder.sequence(request)
        answer = self._encoder.answer(request, sequence.prompt_ids)
        self._loop.add(Request(sequence=sequence, answer=answer, reply=reply))

    def close(self) -> None:
        self._loop.close()
        self._fetched.close()


class LocalForward:
    """All layers in this process: passes run one after another on a thread of their own."""

    def __init__(self, engine: StageEngine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def submit(self, batch: ScheduledBatch) -> Future[ForwardResult]:
        return self._thread.submit(self._step, batch)

    def _step(self, batch: ScheduledBatch) -> ForwardResult:
        import torch

        result = self._engine.step(batch.forward, torch.tensor(batch.token_ids, dtype=torch.int32))
        assert isinstance(result, ForwardResult)
        return result

    def close(self) -> None:
        self._thread.shutdown()


def _sized(kv: KvConfig, max_context: int, max_sequences: int) -> KvConfig:
    """A standalone instance gets room for all its sequences at full length."""
    if kv.num_blocks is not None:
        return kv
    blocks = max_sequences * -(-max_context // kv.block_size)
    return KvConfig(num_blocks=blocks, block_size=kv.block_size)


def _local_forward(fetched: Fetched, spec: ModelSpec, kv: KvConfig, device: str) -> LocalForward:
    # The head of a pipeline must not pay for it.
    with fetched.spans.span("import torch"):
        from paraserve_backend.roles.engine import load_engine

    whole = LayerRange(start=0, end=spec.num_layers, total=spec.num_layers)
    return LocalForward(load_engine(fetched, whole, kv, device))
