"""The roles together in one process, against transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from paraserve_backend.errors import Cancelled, InvalidRequest
from paraserve_backend.protocol.sampling import Sampling, Steering
from paraserve_backend.roles.generate import GenerateRole
from tests.support.generate_config import make_generate_config, weights_from
from tests.support.limits import HANG_S
from tests.support.models import VOCAB_SIZE, TinyModel
from tests.support.replicas import (
    Gauges,
    Replica,
    Reply,
    make_model,
    make_request,
    prompts,
    start_replica,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=[1, 2, 3, 4], ids=lambda stages: f"{stages}-stage")
def replica(request: pytest.FixtureRequest, model: TinyModel, tmp_path: Path) -> Iterator[Replica]:
    with start_replica(model, tmp_path, request.param) as started:
        yield started


def test_sixteen_requests_that_join_and_leave_each_get_the_reference_tokens(
    replica: Replica, model: TinyModel
) -> None:
    asked = [(prompt, 3 + i) for i, prompt in enumerate(prompts(16))]
    replies = [replica.ask(prompt, count) for prompt, count in asked]
    for reply, (prompt, count) in zip(replies, asked, strict=True):
        assert reply.token_ids() == model.greedy(prompt, count)
    assert replica.gauges.idle.wait(HANG_S)
    assert replica.gauges.state.kv_blocks_used == 0


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
    assert replica.gauges.idle.wait(HANG_S)
    assert replica.gauges.state.kv_blocks_used == 0


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
    config = make_generate_config(weights_from(model.folder))
    role = GenerateRole(config, None, Gauges())
    try:
        reply = Reply()
        role.add(make_request([3, 4, 5], 9), reply)
        assert reply.token_ids() == model.greedy([3, 4, 5], 9)
    finally:
        role.close()
    assert not list(Path("/dev/shm").glob(f"paraserve-standalone-{os.getpid()}-*"))
