"""The roles together in one process: real tier, real activation channel, no Triton.

The ensemble is stood in for by calling the first stage and the link one after the other, which is
all it does.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from paraserve_backend.answer import Delta
from paraserve_backend.channel import Buffer
from paraserve_backend.config import (
    ChannelConfig,
    GenerateConfig,
    KvConfig,
    LinkConfig,
    StageConfig,
    WeightsConfig,
)
from paraserve_backend.engine.batch import ForwardResult, Sampling, Steering
from paraserve_backend.engine.batch_codec import decode_result, encode_batch
from paraserve_backend.engine.batching import ScheduledBatch
from paraserve_backend.engine.loop import Forward
from paraserve_backend.errors import Cancelled, InvalidRequest, ParaServeError
from paraserve_backend.request import GenerateRequest
from paraserve_backend.roles.fetched import open_weights
from paraserve_backend.roles.generate import GenerateRole
from paraserve_backend.roles.link import LinkRole
from paraserve_backend.roles.stage import StageRole
from paraserve_backend.weights.checkpoint import read_index
from paraserve_backend.weights.fetch import fetch
from paraserve_backend.weights.plan import plan_fetch, split_layers, stage_tensors
from paraserve_backend.weights.source import open_source
from paraserve_backend.weights.tier import Tier
from tests.backend.models import VOCAB_SIZE, TinyModel, write_model

KV = KvConfig(num_blocks=256, block_size=4)
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("model")
    made = write_model(folder, "llama", seed=3)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    return made


class Gauges:
    def __init__(self) -> None:
        self.kv_blocks_used = 0
        self.idle = threading.Event()

    def update(self, *, running: int, waiting: int, kv_blocks_used: int) -> None:
        self.kv_blocks_used = kv_blocks_used
        if running + waiting:
            self.idle.clear()
        else:
            self.idle.set()


@dataclass(slots=True, eq=False)
class Reply:
    """Collects one request's answer."""

    deltas: queue.SimpleQueue[Delta | ParaServeError] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def send(self, delta: Delta) -> None:
        self.deltas.put(delta)

    def fail(self, error: ParaServeError) -> None:
        self.deltas.put(error)

    def is_cancelled(self) -> bool:
        return self.cancelled.is_set()

    def next(self) -> Delta:
        got = self.deltas.get(timeout=TIMEOUT_S)
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
        return answered.result(timeout=TIMEOUT_S)

    def close(self) -> None:
        self._threads.shutdown()


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    role: GenerateRole
    gauges: Gauges

    def ask(self, prompt: Sequence[int], max_tokens: int = 12, **options: object) -> Reply:
        reply = Reply()
        self.role.add(make_request(prompt, max_tokens, **options), reply)
        return reply


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


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def fetch_stages(model: TinyModel, run_dir: Path, stages: int) -> list[StageConfig]:
    """Fetch every stage as its agent would, and return the stages' settings without channels."""
    source = open_source(str(model.folder))
    index, spec = read_index(source), model.spec
    tier = Tier.open(run_dir / "tier")
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
        plan = plan_fetch(index, tensors, fetch_id=f"d.1.{number}")
        fetch(plan, source, tier, timeout_s=TIMEOUT_S, cancel=threading.Event())
        weights = WeightsConfig(
            run_dir=run_dir, fetch_id=plan.fetch_id, source=None, endpoint_url=None, region=None
        )
        configs.append(
            StageConfig(
                replica="d.1", layers=layers, weights=weights, kv=KV, device="cpu", channel=None
            )
        )
    tier.close()
    return configs


@contextlib.contextmanager
def start_replica(model: TinyModel, run_dir: Path, stages: int) -> Iterator[Replica]:
    configs = fetch_stages(model, run_dir, stages)
    gauges = Gauges()
    with contextlib.ExitStack() as stack:
        forward: Forward | None = None
        if stages > 1:
            forward = start_pipeline(stack, configs, run_dir)
        role = GenerateRole(
            GenerateConfig(
                deployment="d",
                replica="d.1",
                weights=configs[0].weights,
                kv=KV,
                device="cpu",
                forward_model=None if stages == 1 else "d.1.forward",
                max_context=256,
                max_sequences=16,
                max_batch_tokens=24,
                batches_in_flight=stages,
            ),
            forward,
            gauges,
        )
        stack.callback(role.close)
        yield Replica(role=role, gauges=gauges)


def start_pipeline(
    stack: contextlib.ExitStack, configs: Sequence[StageConfig], run_dir: Path
) -> ChainForward:
    key_file = run_dir / "curve.key"
    key_file.write_bytes(b"\n".join(zmq.curve_keypair()))
    # addresses[0] is the link's; the last stage's next member is the link again.
    addresses = [f"tcp://127.0.0.1:{port}" for port in free_ports(len(configs))]
    channels = [
        ChannelConfig(listen=address, next=addresses[(i + 1) % len(addresses)], key_file=key_file)
        for i, address in enumerate(addresses)
    ]
    roles = []
    for i, config in enumerate(configs):
        roles.append(
            StageRole(
                StageConfig(
                    replica=config.replica,
                    layers=config.layers,
                    weights=config.weights,
                    kv=config.kv,
                    device=config.device,
                    channel=channels[i] if i else None,
                ),
                open_weights(config.weights),
            )
        )
        stack.callback(roles[-1].close)
    link = LinkRole(LinkConfig(replica="d.1", channel=channels[0], forward_timeout_s=TIMEOUT_S))
    stack.callback(link.close)
    return ChainForward(roles[0], link, len(configs))


@pytest.fixture(params=[1, 2, 3, 4], ids=lambda stages: f"{stages}-stage")
def replica(request: pytest.FixtureRequest, model: TinyModel, tmp_path: Path) -> Iterator[Replica]:
    with start_replica(model, tmp_path, request.param) as started:
        yield started


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [
        rng.integers(1, VOCAB_SIZE, size=int(length)).tolist()
        for length in rng.integers(1, 60, size=count)
    ]


def test_sixteen_requests_that_join_and_leave_each_get_the_reference_tokens(
    replica: Replica, model: TinyModel
) -> None:
    asked = [(prompt, 3 + i) for i, prompt in enumerate(prompts(16))]
    replies = [replica.ask(prompt, count) for prompt, count in asked]
    for reply, (prompt, count) in zip(replies, asked, strict=True):
        assert reply.token_ids() == model.greedy(prompt, count)
    assert replica.gauges.idle.wait(TIMEOUT_S)
    assert replica.gauges.kv_blocks_used == 0


def test_a_cancelled_stream_frees_its_blocks_and_leaves_the_others_alone(
    replica: Replica, model: TinyModel
) -> None:
    first, second = prompts(2)
    endless, other = replica.ask(first, 200), replica.ask(second, 20)
    endless.next()
    endless.cancelled.set()
    with pytest.raises(Cancelled):
        endless.all()
    assert other.token_ids() == model.greedy(second, 20)
    assert replica.gauges.idle.wait(TIMEOUT_S)
    assert replica.gauges.kv_blocks_used == 0


def test_an_unstreamed_answer_comes_in_one_piece_with_its_counts(
    replica: Replica, model: TinyModel
) -> None:
    prompt = prompts(1)[0]
    (delta,) = replica.ask(prompt, 7, is_stream=False).all()
    assert list(delta.token_ids) == model.greedy(prompt, 7)
    assert (delta.finish_reason, delta.num_input_tokens, delta.num_output_tokens) == (
        "length",
        len(prompt),
        7,
    )


def test_a_stop_word_ends_the_text_before_it(replica: Replica, model: TinyModel) -> None:
    prompt = prompts(1)[0]
    words = [f"w{token}" for token in model.greedy(prompt, 12)]
    stop = next(word for i, word in enumerate(words) if i > 3 and word not in words[:i])
    deltas = replica.ask(prompt, 200, stop_words=(f" {stop}",)).all()
    text = "".join(delta.text for delta in deltas)
    assert text.split() == words[: words.index(stop)]
    assert deltas[-1].finish_reason == "stop"


def test_sampled_tokens_depend_on_the_seed_alone(replica: Replica) -> None:
    prompt = prompts(1)[0]
    sampling = Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=9)
    alone = replica.ask(prompt, 12, sampling=sampling).token_ids()
    crowd = [replica.ask(other, 12, sampling=Sampling(temperature=1.0)) for other in prompts(5)]
    again = replica.ask(prompt, 12, sampling=sampling).token_ids()
    assert again == alone
    assert all(len(reply.token_ids()) == 12 for reply in crowd)


def test_penalties_bad_words_and_the_shortest_answer_are_those_of_transformers(
    replica: Replica, model: TinyModel
) -> None:
    asked = prompts(4)
    plain = model.greedy(asked[0], 20)
    end, single, first, second = plain[2], plain[5], plain[8], plain[9]
    crowd = [replica.ask(prompt, 24) for prompt in asked]
    replies = [
        replica.ask(
            prompt,
            24,
            sampling=Sampling(steering=Steering(repetition_penalty=1.4)),
            bad_words=(f"w{single}", f"w{first} w{second}"),
            min_tokens=5,
            end_id=end,
        )
        for prompt in asked
    ]
    for prompt, reply, plain_reply in zip(asked, replies, crowd, strict=True):
        assert reply.token_ids() == oracle_answer(
            model,
            prompt,
            max_new_tokens=24,
            min_new_tokens=5,
            repetition_penalty=1.4,
            bad_words_ids=[[single], [first, second]],
            eos_token_id=end,
        )
        assert plain_reply.token_ids() == model.greedy(prompt, 24)


def oracle_answer(model: TinyModel, prompt: Sequence[int], **options: object) -> list[int]:
    """What transformers generates greedily with these options."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        whole = model.oracle.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, **options
        )
    return [int(token) for token in whole[0, len(prompt) :]]


def test_penalised_draws_depend_on_the_seed_alone(replica: Replica) -> None:
    prompt = prompts(1)[0]
    steering = Steering(
        min_p=0.01, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.3
    )
    options = {"sampling": Sampling(temperature=1.0, seed=7, steering=steering), "min_tokens": 3}
    alone = replica.ask(prompt, 12, **options).token_ids()
    crowd = [replica.ask(other, 12, bad_words=("w5",)) for other in prompts(5)]
    again = replica.ask(prompt, 12, **options).token_ids()
    assert again == alone
    assert all(len(reply.token_ids()) == 12 for reply in crowd)


def test_log_probabilities_are_those_of_the_model(replica: Replica, model: TinyModel) -> None:
    prompt = prompts(1)[0]
    sampling = Sampling(temperature=1.0, seed=3, steering=Steering(num_logprobs=2))
    (delta,) = replica.ask(prompt, 6, sampling=sampling, is_stream=False).all()
    ids = torch.tensor([prompt + list(delta.token_ids)])
    with torch.inference_mode():
        expected = model.oracle(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for step, (token, *rivals) in enumerate(delta.ranked):
        assert token.token_id == delta.token_ids[step]
        assert token.text == f"w{token.token_id}"
        for entry in (token, *rivals):
            assert entry.logprob == pytest.approx(float(expected[step, entry.token_id]), abs=1e-3)
            assert entry.rank == int((expected[step] >= expected[step, entry.token_id]).sum())
        assert {1, 2} <= {entry.rank for entry in (token, *rivals)}
    assert delta.cumulative_logprob == pytest.approx(sum(delta.logprobs))


def test_a_stop_token_ends_the_answer_even_where_end_tokens_are_ignored(
    replica: Replica, model: TinyModel
) -> None:
    prompt = prompts(1)[0]
    plain = model.greedy(prompt, 12)
    stop = next(token for i, token in enumerate(plain) if i > 3 and token not in plain[:i])
    (delta,) = replica.ask(
        prompt, 40, stop_token_ids=(stop,), ignore_eos=True, is_stream=False
    ).all()
    assert list(delta.token_ids) == plain[: plain.index(stop) + 1]
    assert delta.finish_reason == "stop"
    assert delta.text.split() == [f"w{token}" for token in delta.token_ids[:-1]]


def test_token_ids_are_echoed_as_text(replica: Replica, model: TinyModel) -> None:
    (delta,) = replica.ask([5, 6, 7], 3, is_stream=False, echo=True).all()
    expected = [f"w{token}" for token in [5, 6, 7, *model.greedy([5, 6, 7], 3)]]
    assert delta.text.split() == expected
    assert len(delta.token_ids) == 3


def test_an_answer_never_leaves_the_context(replica: Replica) -> None:
    (delta,) = replica.ask([1] * 250, 100, is_stream=False).all()
    assert (delta.num_output_tokens, delta.finish_reason) == (6, "length")


def test_text_goes_in_and_comes_back(replica: Replica, model: TinyModel) -> None:
    (delta,) = replica.ask([], 3, input_ids=None, text="w5 w6 w7", is_stream=False, echo=True).all()
    expected = ["w5", "w6", "w7", *(f"w{token}" for token in model.greedy([5, 6, 7], 3))]
    assert delta.text.split() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"input_ids": (1,) * 256},
            "The prompt has 256 tokens; the context holds 256, and at least one must be left for "
            "the answer.",
        ),
        ({"input_ids": (1, VOCAB_SIZE)}, f"Token ids must be in [0, {VOCAB_SIZE})."),
        ({"input_ids": (1,), "end_id": VOCAB_SIZE}, f"Token ids must be in [0, {VOCAB_SIZE})."),
        ({"input_ids": (1,), "stop_token_ids": (-5,)}, f"Token ids must be in [0, {VOCAB_SIZE})."),
        (
            {"input_ids": None, "text": ""},
            "The prompt is empty; give 'text_input' at least one token.",
        ),
    ],
)
def test_a_prompt_that_cannot_run_is_refused_with_the_reason(
    model: TinyModel, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with start_replica(model, tmp_path, 1) as replica:
        with pytest.raises(InvalidRequest) as caught:
            replica.ask([], 4, **options)
        assert str(caught.value) == message


def test_a_standalone_model_fetches_its_own_weights(model: TinyModel) -> None:
    weights = WeightsConfig(
        run_dir=None, fetch_id=None, source=str(model.folder), endpoint_url=None, region=None
    )
    config = GenerateConfig(
        deployment="standalone",
        replica="standalone",
        weights=weights,
        kv=KvConfig(num_blocks=None, block_size=16),
        device="cpu",
        forward_model=None,
        max_context=None,
        max_sequences=4,
        max_batch_tokens=64,
        batches_in_flight=1,
    )
    role = GenerateRole(config, None, Gauges())
    try:
        reply = Reply()
        role.add(make_request([3, 4, 5], 9), reply)
        assert reply.token_ids() == model.greedy([3, 4, 5], 9)
    finally:
        role.close()
    assert not list(Path("/dev/shm").glob(f"paraserve-standalone-{os.getpid()}-*"))
