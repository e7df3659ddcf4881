"""Requests that change their replica in the middle, against transformers and undisturbed runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from paraserve_backend.engines.native import handover_source
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.hand_over import Target
from paraserve_backend.protocol.parameters import KvConfig
from paraserve_backend.protocol.resume import Resume
from paraserve_backend.protocol.sampling import ChosenToken, Ranking, Sampling, Steering
from tests.support.limits import HANG_S
from tests.support.models import VOCAB_SIZE, TinyModel
from tests.support.ports import free_ports
from tests.support.replicas import (
    KV,
    Replica,
    Reply,
    make_model,
    prompts,
    start_replica,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def is_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no request stay at home because this machine was busy for a second."""
    monkeypatch.setattr(handover_source, "_HELD_TIMEOUT_S", HANG_S)


@contextlib.contextmanager
def two_replicas(
    model: TinyModel, run_dir: Path, stages: tuple[int, int], *, kv: KvConfig = KV
) -> Iterator[tuple[Replica, Replica]]:
    """A source, and a target with KV cache `kv`."""
    with (
        start_replica(model, run_dir, stages[0]) as source,
        start_replica(model, run_dir, stages[1], name="d.2", kv=kv) as target,
    ):
        yield source, target


def begun(reply: Reply) -> Reply:
    """Wait until the request is being decoded."""
    reply.seen.append(reply.next())
    return reply


def rest_of(reply: Reply) -> list[int]:
    """All the answer's tokens, to its end."""
    reply.seen.extend(reply.all())
    return [token for delta in reply.seen for token in delta.token_ids]


def assert_empty(*replicas: Replica) -> None:
    for replica in replicas:
        assert replica.gauges.idle.wait(HANG_S)
        assert replica.gauges.state.kv_blocks_used == 0


@pytest.mark.usefixtures("is_patient")
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_sixteen_requests_move_in_the_middle_and_no_token_differs(
    model: TinyModel, tmp_path: Path, stages: int
) -> None:
    with two_replicas(model, tmp_path, (stages, 1)) as (source, target):
        peers = {"d.2": target}
        asked = [(prompt, 100 + i) for i, prompt in enumerate(prompts(16))]
        replies = [source.ask_resumable(peers, prompt, count) for prompt, count in asked]
        for reply in replies:
            begun(reply)
        source.role.hand_over((target.target,))
        late = source.ask_resumable(peers, [1, 2, 3], 8)
        for reply, (prompt, count) in zip(replies, asked, strict=True):
            assert rest_of(reply) == model.greedy(prompt, count)
            assert [replica for replica, _ in reply.moves] == ["d.2"]
        assert late.token_ids() == model.greedy([1, 2, 3], 8)
        assert_empty(source, target)
        # With their KV cache, not by prefilling again: the late one alone had none.
        assert source.gauges.state.requests_moved == 16
        sent = source.gauges.state
        assert sent.kv_blocks_sent_held < sent.kv_blocks_sent_ahead + sent.kv_blocks_sent_held


@pytest.mark.usefixtures("is_patient")
def test_a_request_goes_back_and_forth(model: TinyModel, tmp_path: Path) -> None:
    with two_replicas(model, tmp_path, (1, 1)) as (first, second):
        reply = first.ask_resumable({"d.1": first, "d.2": second}, [4, 5, 6], 200)
        for source, target in ((first, second), (second, first), (first, second)):
            begun(reply)
            target.role.hand_over(())
            source.role.hand_over((target.target,))
        assert rest_of(reply) == model.greedy([4, 5, 6], 200)
        assert len(reply.moves) >= 1
        assert_empty(first, second)


def test_a_pipeline_takes_requests_over_by_prefilling_again(
    model: TinyModel, tmp_path: Path
) -> None:
    with two_replicas(model, tmp_path, (1, 3)) as (source, target):
        waiting = source.ask_resumable({"d.2": target}, [7, 8], 40)
        source.role.hand_over((target.target,))
        assert waiting.token_ids() == model.greedy([7, 8], 40)


@pytest.mark.usefixtures("is_patient")
def test_draws_penalties_and_log_probabilities_go_on_as_if_nothing_had_moved(
    model: TinyModel, tmp_path: Path
) -> None:
    steering = Steering(repetition_penalty=1.2, frequency_penalty=0.3, num_logprobs=2)
    options = {
        "sampling": Sampling(temperature=1.0, seed=11, steering=steering),
        "bad_words": ("w3",),
        "min_tokens": 4,
        "is_stream": False,
    }
    prompt = prompts(1)[0]
    with two_replicas(model, tmp_path, (2, 1)) as (source, target):
        (alone,) = source.ask(prompt, 120, **options).all()
        moving = source.ask_resumable({"d.2": target}, prompt, 120, **options)
        witness = begun(source.ask_resumable({"d.2": target}, prompt, 120))
        source.role.hand_over((target.target,))
        (moved,) = moving.all()
        rest_of(witness)
    assert moving.moves
    assert (moved.token_ids, moved.text) == (alone.token_ids, alone.text)
    assert moved.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    assert [len(each) for each in moved.ranked] == [len(each) for each in alone.ranked]
    assert moved.num_output_tokens == alone.num_output_tokens
    assert moved.cumulative_logprob == pytest.approx(alone.cumulative_logprob, abs=1e-2)


@pytest.mark.usefixtures("is_patient")
def test_text_goes_on_where_it_was_and_a_stop_word_may_lie_on_the_border(
    model: TinyModel, tmp_path: Path
) -> None:
    prompt = prompts(1)[0]
    words = [f"w{token}" for token in model.greedy(prompt, 60)]
    with two_replicas(model, tmp_path, (2, 1)) as (source, target):
        reply = begun(
            source.ask_resumable(
                {"d.2": target}, prompt, 100, stop_words=(f" {words[50]} {words[51]}",)
            )
        )
        source.role.hand_over((target.target,))
        rest_of(reply)
    text = "".join(delta.text for delta in reply.seen)
    assert text.split() == words[:50]
    assert reply.seen[-1].finish_reason == "stop"


def test_requests_stay_where_they_are_when_the_target_is_silent(
    model: TinyModel, tmp_path: Path
) -> None:
    with start_replica(model, tmp_path, 2) as source:
        reply = begun(source.ask_resumable({}, [3, 4, 5], 60))
        silent = Target(replica="d.2", address=f"tcp://127.0.0.1:{free_ports(1)[0]}")
        source.role.hand_over((silent,))
        assert rest_of(reply) == model.greedy([3, 4, 5], 60)
        assert not reply.moves
        assert_empty(source)


def test_requests_stay_where_they_are_when_the_target_has_no_room(
    model: TinyModel, tmp_path: Path
) -> None:
    tight = KvConfig(num_blocks=8, block_size=4)
    with two_replicas(model, tmp_path, (2, 1), kv=tight) as (source, target):
        long = begun(source.ask_resumable({"d.2": target}, [5] * 40, 60))
        source.role.hand_over((target.target,))
        assert rest_of(long) == model.greedy([5] * 40, 60)
        assert not long.moves
        assert_empty(source, target)


@pytest.mark.usefixtures("is_patient")
def test_a_request_nobody_can_follow_stays(model: TinyModel, tmp_path: Path) -> None:
    with two_replicas(model, tmp_path, (2, 1)) as (source, target):
        reply = begun(source.ask([3, 4, 5], 40))
        moving = begun(source.ask_resumable({"d.2": target}, [6, 7], 40))
        source.role.hand_over((target.target,))
        assert rest_of(moving) == model.greedy([6, 7], 40)
        assert rest_of(reply) == model.greedy([3, 4, 5], 40)
        assert not reply.moves


@pytest.mark.usefixtures("is_patient")
def test_a_cancelled_request_on_its_way_frees_everything_on_both_sides(
    model: TinyModel, tmp_path: Path
) -> None:
    with two_replicas(model, tmp_path, (3, 1)) as (source, target):
        replies = [begun(source.ask_resumable({"d.2": target}, p, 150)) for p in prompts(6)]
        source.role.hand_over((target.target,))
        for reply in replies[::2]:
            reply.cancelled.set()
        for reply, prompt in list(zip(replies, prompts(6), strict=True))[1::2]:
            assert rest_of(reply) == model.greedy(prompt, 150)
        assert_empty(source, target)


@pytest.mark.parametrize("ticket", [0, 77])
def test_a_request_comes_without_its_cache_and_is_prefilled_again(
    model: TinyModel, tmp_path: Path, ticket: int
) -> None:
    whole = model.greedy([9, 8, 7], 20)
    tokens = tuple(ChosenToken(token_id=t, logprob=-1.0, ranking=None) for t in whole[:8])
    with start_replica(model, tmp_path, 2) as replica:
        reply = Reply()
        request = replica.request([9, 8, 7], 20)
        resume = Resume(ticket=ticket, seed=0, max_tokens=20, tokens=tokens)
        replica.role.add(request, reply, resume)
        assert reply.token_ids() == whole[8:]


def test_a_request_that_has_ended_is_not_gone_on_with(model: TinyModel, tmp_path: Path) -> None:
    tokens = (ChosenToken(token_id=1, logprob=0.0, ranking=None),) * 4
    with start_replica(model, tmp_path, 1) as replica, pytest.raises(InvalidRequest):
        replica.role.add(
            replica.request([1], 4), Reply(), Resume(seed=0, max_tokens=4, tokens=tokens)
        )


@pytest.mark.parametrize(
    "ranking", [None, Ranking(rank=2, token_ids=(1, VOCAB_SIZE), logprobs=(-0.5, -1.0))]
)
def test_progress_survives_its_encoding(ranking: Ranking | None) -> None:
    tokens = (ChosenToken(token_id=5, logprob=-0.25, ranking=ranking),) * 3
    resume = Resume(ticket=2**63, seed=2**64 - 1, max_tokens=7, tokens=tokens)
    assert Resume.decode(resume.encode()) == resume


@pytest.mark.parametrize("text", ["", "no base64!", "AAAA", "AQ" * 40])
def test_progress_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="Parameter 'resume' is not one"):
        Resume.decode(text)
