"""Whole replicas in one process: real tier, real activation channel, no Triton.

The ensemble is stood in for by calling the first stage and the link one after the other, which is
all it does; the gateway by a reply that follows its request.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import zmq

from paraserve_backend.channel.transport import Buffer
from paraserve_backend.engines.base import LoopState
from paraserve_backend.engines.native.batcher import ScheduledBatch
from paraserve_backend.engines.native.loop import Forward
from paraserve_backend.errors import ParaServeError
from paraserve_backend.generation.answer import Delta
from paraserve_backend.protocol.forward import ForwardResult
from paraserve_backend.protocol.forward_codec import decode_result, encode_batch
from paraserve_backend.protocol.hand_over import Target
from paraserve_backend.protocol.names import ReplicaModels, fetch_id
from paraserve_backend.protocol.parameters import (
    ChannelConfig,
    HandOverConfig,
    KvConfig,
    LinkConfig,
    StageConfig,
    WeightsConfig,
)
from paraserve_backend.protocol.request import GenerateRequest
from paraserve_backend.protocol.resume import Resume
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.protocol.sampling import Sampling
from paraserve_backend.roles.generate import GenerateRole
from paraserve_backend.roles.link import LinkRole
from paraserve_backend.roles.stage import StageRole
from paraserve_backend.roles.weights import open_weights
from paraserve_backend.weights.checkpoint.fetch_plan import plan_fetch
from paraserve_backend.weights.checkpoint.index import read_index
from paraserve_backend.weights.checkpoint.stages import split_layers, stage_tensors
from paraserve_backend.weights.fetching.fetch import fetch
from paraserve_backend.weights.sources.open import open_source
from paraserve_backend.weights.tiers.memory import Tier
from tests.support.generate_config import make_generate_config
from tests.support.limits import HANG_S
from tests.support.models import VOCAB_SIZE, TinyModel, write_model, write_words
from tests.support.ports import free_ports

KV = KvConfig(num_blocks=256, block_size=4)


def make_model(folder: Path) -> TinyModel:
    """A Llama whose tokens are the words w0, w1, ..."""
    made = write_model(folder, "llama", seed=3)
    write_words(folder)
    return made


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [
        rng.integers(1, VOCAB_SIZE, size=int(length)).tolist()
        for length in rng.integers(1, 60, size=count)
    ]


class Gauges:
    def __init__(self) -> None:
        self.state = LoopState()
        self.idle = threading.Event()

    def update(self, state: LoopState) -> None:
        self.state = state
        if state.running + state.waiting:
            self.idle.clear()
        else:
            self.idle.set()


@dataclass(slots=True, eq=False)
class Reply:
    """Collects one request's answer, from whichever replica it comes."""

    #: What to send again when it moves, and to whom.
    request: GenerateRequest | None = None
    peers: dict[str, Replica] = field(default_factory=dict)
    moves: list[tuple[str, Resume]] = field(default_factory=list)
    #: What a test has taken already.
    seen: list[Delta] = field(default_factory=list)
    deltas: queue.SimpleQueue[Delta | ParaServeError] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def send(self, delta: Delta) -> None:
        self.deltas.put(delta)

    def fail(self, error: ParaServeError) -> None:
        self.deltas.put(error)

    def move(self, replica: str, resume: Resume) -> None:
        self.moves.append((replica, resume))
        assert self.request is not None, "only a request that can be followed is moved"
        role = self.peers[replica].role
        role.add(self.request, self, Resume.decode(resume.encode()))

    def is_cancelled(self) -> bool:
        return self.cancelled.is_set()

    def next(self) -> Delta:
        got = self.deltas.get(timeout=HANG_S)
        if isinstance(got, ParaServeError):
            raise got
        return got

    def all(self) -> list[Delta]:
        got = [self.next()]
        while got[-1].finish_reason is None:
            got.append(self.next())
        return got

    def token_ids(self) -> list[int]:
        return [token for delta in self.all() for token in delta.token_ids]


class ChainForward:
    """What the ensemble does: the first stage, then the link."""

    def __init__(self, first: StageRole, link: LinkRole, batches_in_flight: int) -> None:
        self._first = first
        self._link = link
        self._threads = ThreadPoolExecutor(batches_in_flight)
        self._sending = threading.Lock()  # Triton calls a model instance from one thread

    def submit(self, batch: ScheduledBatch) -> Future[ForwardResult]:
        return self._threads.submit(self._call, batch)

    def _call(self, batch: ScheduledBatch) -> ForwardResult:
        answered: Future[ForwardResult] = Future()

        def answer(outcome: Buffer | ParaServeError) -> None:
            if isinstance(outcome, ParaServeError):
                answered.set_exception(outcome)
            else:
                answered.set_result(decode_result(bytes(outcome)))

        encoded = encode_batch(batch.forward)
        with self._sending:
            hidden = self._first.step(encoded, np.array(batch.token_ids, np.int32))
            self._link.forward(encoded, hidden, answer)
        return answered.result(timeout=HANG_S)

    def close(self) -> None:
        self._threads.shutdown()


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    role: GenerateRole
    gauges: Gauges
    target: Target

    def ask(self, prompt: Sequence[int], max_tokens: int = 12, **options: object) -> Reply:
        reply = Reply()
        self.role.add(make_request(prompt, max_tokens, **options), reply)
        return reply

    def ask_resumable(
        self, peers: dict[str, Replica], prompt: Sequence[int], max_tokens: int, **options: object
    ) -> Reply:
        """Ask as a gateway does that follows its requests to `peers`."""
        request = self.request(prompt, max_tokens, **options)
        reply = Reply(request=request, peers=peers)
        begin = Resume(seed=request.sampling.seed, max_tokens=max_tokens, tokens=())
        self.role.add(request, reply, begin)
        return reply

    def request(self, prompt: Sequence[int], max_tokens: int, **options: object) -> GenerateRequest:
        return make_request(prompt, max_tokens, **options)


def make_request(prompt: Sequence[int], max_tokens: int, **options: object) -> GenerateRequest:
    fields = {
        "text": None,
        "input_ids": tuple(prompt),
        "sampling": Sampling(),
        "max_tokens": max_tokens,
        "is_stream": True,
        **options,
    }
    return GenerateRequest(**fields)  # type: ignore[arg-type]


def fetch_stages(model: TinyModel, run_dir: Path, stages: int, replica: str) -> list[StageConfig]:
    """Fetch every stage as its agent would, and return the stages' settings without channels."""
    source = open_source(str(model.folder))
    index, spec = read_index(source), model.spec
    tier = Tier.open(RunDir(run_dir).tier.path)
    configs = []
    for number, layers in enumerate(
        split_layers(
            index,
            spec.names,
            tied=spec.tie_word_embeddings,
            num_layers=spec.num_layers,
            stages=stages,
        )
    ):
        tensors = stage_tensors(index, spec.names, tied=spec.tie_word_embeddings, layers=layers)
        plan = plan_fetch(index, tensors, fetch_id=fetch_id(replica, number))
        fetch(tier.begin(plan), source, tier, timeout_s=HANG_S, cancel=threading.Event())
        weights = WeightsConfig(
            run_dir=run_dir, fetch_id=plan.fetch_id, source=None, endpoint_url=None, region=None
        )
        configs.append(
            StageConfig(
                replica=replica,
                layers=layers,
                weights=weights,
                kv=KV,
                device="cpu",
                channel=None,
                key_file=_key_file(run_dir),
            )
        )
    tier.close()
    return configs


def _key_file(run_dir: Path) -> Path:
    """The deployment's key pair, for all its replicas."""
    key_file = run_dir / "curve.key"
    if not key_file.exists():
        key_file.write_bytes(b"\n".join(zmq.curve_keypair()))
    return key_file


@contextlib.contextmanager
def start_replica(
    model: TinyModel, run_dir: Path, stages: int, *, name: str = "d.1", kv: KvConfig = KV
) -> Iterator[Replica]:
    configs = [replace(c, kv=kv) for c in fetch_stages(model, run_dir, stages, name)]
    gauges = Gauges()
    inbox = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    with contextlib.ExitStack() as stack:
        forward: Forward | None = None
        if stages > 1:
            forward = start_pipeline(stack, configs)
        role = GenerateRole(
            make_generate_config(
                configs[0].weights,
                replica=name,
                kv=kv,
                forward_model=None if stages == 1 else ReplicaModels(name).forward,
                max_context=256,
                max_sequences=16,
                max_batch_tokens=24,
                batches_in_flight=stages,
                hand_over=HandOverConfig(inbox=inbox, key_file=_key_file(run_dir)),
            ),
            forward,
            gauges,
        )
        stack.callback(role.close)
        yield Replica(role=role, gauges=gauges, target=Target(replica=name, address=inbox))


def start_pipeline(stack: contextlib.ExitStack, configs: Sequence[StageConfig]) -> ChainForward:
    key_file = configs[0].key_file
    assert key_file is not None
    # addresses[0] is the link's; the last stage's next member is the link again.
    addresses = [f"tcp://127.0.0.1:{port}" for port in free_ports(len(configs))]
    channels = [
        ChannelConfig(listen=address, next=addresses[(i + 1) % len(addresses)], key_file=key_file)
        for i, address in enumerate(addresses)
    ]
    roles = []
    for config, channel in zip(configs, [None, *channels[1:]], strict=True):
        roles.append(StageRole(replace(config, channel=channel), open_weights(config.weights)))
        stack.callback(roles[-1].close)
    link = LinkRole(LinkConfig(replica="d.1", channel=channels[0], forward_timeout_s=HANG_S))
    stack.callback(link.close)
    return ChainForward(roles[0], link, len(configs))
