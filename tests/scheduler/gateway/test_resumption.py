"""What a request carries from replica to replica."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.protocol.request import GenerateRequest, WantedOutputs
from paraserve_backend.protocol.resume import HAND_OVER_TO, RESUME, Resume
from paraserve_backend.protocol.sampling import ChosenToken, Ranking, Sampling
from paraserve_scheduler.gateway.resumption import Resumption

NO_LOGPROB = 0.0


def make_asked(*, is_stream: bool = True, wanted: WantedOutputs | None = None) -> GenerateRequest:
    return GenerateRequest(
        text="hello",
        input_ids=None,
        sampling=Sampling(seed=41),
        max_tokens=9,
        is_stream=is_stream,
        wanted=wanted or WantedOutputs(),
    )


def token(token_id: int, logprob: float = NO_LOGPROB) -> ChosenToken:
    return ChosenToken(token_id=token_id, logprob=logprob, ranking=None)


def response_with(**outputs: bytes) -> kserve.ModelInferResponse:
    response = kserve.ModelInferResponse()
    for name, raw in outputs.items():
        response.outputs.add(name=name)
        response.raw_output_contents.append(raw)
    return response


def tokens_response(*ids: int) -> kserve.ModelInferResponse:
    return response_with(text_output=b"\0\0\0\0", output_ids=struct.pack(f"<{len(ids)}i", *ids))


def text(value: str) -> bytes:
    return struct.pack("<I", len(value)) + value.encode()


def move_response(replica: str, resume: Resume) -> kserve.ModelInferResponse:
    return response_with(**{HAND_OVER_TO: text(replica), RESUME: text(resume.encode())})


def resume_of(request: kserve.ModelInferRequest) -> Resume:
    return Resume.decode(request.parameters[RESUME].string_param)


def test_the_first_replica_learns_that_the_request_can_be_followed_and_its_seed() -> None:
    request = kserve.ModelInferRequest()
    Resumption(request, make_asked())
    assert resume_of(request) == Resume(seed=41, max_tokens=9, tokens=())


def test_a_replica_that_hands_over_says_who_goes_on_and_from_where() -> None:
    request = kserve.ModelInferRequest()
    resumption = Resumption(request, make_asked())
    assert resumption.receive(tokens_response(1))
    resume = Resume(ticket=5, seed=41, max_tokens=9, tokens=(token(1, -0.5),))
    assert not resumption.receive(move_response("d.2", resume))
    assert resumption.next_replica == "d.2"
    assert resume_of(request) == resume


def test_after_a_loss_the_tokens_sent_since_are_told_to_the_next_replica() -> None:
    request = kserve.ModelInferRequest()
    resumption = Resumption(request, make_asked())
    resumption.receive(tokens_response(1))
    resumption.receive(
        move_response("d.2", Resume(ticket=5, seed=41, max_tokens=9, tokens=(token(1),)))
    )
    resumption.receive(tokens_response(2, 3))
    assert resumption.lose()
    assert resumption.next_replica is None
    # Without the ticket: whatever KV cache there was is lost with it.
    assert resume_of(request).ticket == 0
    assert [each.token_id for each in resume_of(request).tokens] == [1, 2, 3]
    resumption.receive(tokens_response(4))
    assert resumption.lose()
    assert [each.token_id for each in resume_of(request).tokens] == [1, 2, 3, 4]


def test_an_answer_in_one_piece_starts_over_from_what_is_known() -> None:
    request = kserve.ModelInferRequest()
    wanted = WantedOutputs(logprobs=True)
    resumption = Resumption(request, make_asked(is_stream=False, wanted=wanted))
    assert resumption.lose()
    assert resume_of(request).tokens == ()


@given(
    st.lists(st.floats(-20, 0, width=32), min_size=1, max_size=8),
    st.lists(st.floats(-20, 0, width=32), min_size=1, max_size=8),
    st.sampled_from(["cumulative_logprob", "cum_log_probs"]),
)
def test_the_next_replica_knows_the_sum_of_the_log_probabilities_that_were_sent(
    handed_over: list[float], sent: list[float], output: str
) -> None:
    request = kserve.ModelInferRequest()
    wanted = WantedOutputs(cumulative_logprob=True, log_probs=True)
    resumption = Resumption(request, make_asked(wanted=wanted))
    known = tuple(token(1, logprob) for logprob in handed_over)
    resumption.receive(move_response("d.2", Resume(ticket=5, seed=41, max_tokens=9, tokens=known)))
    total = sum(handed_over)
    for logprob in sent:
        total += logprob
        response = tokens_response(2)
        response.outputs.add(name=output)
        response.raw_output_contents.append(struct.pack("<f", total))
        assert resumption.receive(response)
    assert resumption.can_go_on_elsewhere()
    assert resumption.lose()
    tokens = resume_of(request).tokens
    assert [each.token_id for each in tokens] == [1] * len(handed_over) + [2] * len(sent)
    # As the next replica's own output, which has no more digits.
    assert struct.pack("<f", sum(each.logprob for each in tokens)) == struct.pack("<f", total)


def test_a_request_that_was_lost_with_rankings_can_be_handed_over_afterwards() -> None:
    ranked = ChosenToken(
        token_id=3, logprob=-0.5, ranking=Ranking(rank=1, token_ids=(3,), logprobs=(-0.5,))
    )
    tokens = (token(1), ranked)
    resume = Resume(seed=41, max_tokens=9, tokens=tokens)
    decoded = Resume.decode(resume.encode())
    assert [each.token_id for each in decoded.tokens] == [1, 3]


def test_a_request_that_no_other_engine_can_go_on_with_is_not_moved() -> None:
    request = kserve.ModelInferRequest()
    resumption = Resumption(request, make_asked(), can_move=False)
    assert RESUME not in request.parameters
    assert resumption.lose()  # nothing was sent yet
    resumption.receive(tokens_response(1))
    assert not resumption.lose()


def test_a_client_that_names_its_outputs_is_followed_all_the_same() -> None:
    request = kserve.ModelInferRequest()
    request.outputs.add(name="text_output")
    resumption = Resumption(request, make_asked())
    asked_for = [output.name for output in request.outputs]
    assert asked_for == ["text_output", HAND_OVER_TO, RESUME, "output_ids"]
    response = response_with(output_ids=struct.pack("<i", 7), text_output=text("hello"))
    assert resumption.receive(response)
    assert resumption.lose()
    assert [each.token_id for each in resume_of(request).tokens] == [7]
    # The client gets what it has named.
    assert [output.name for output in response.outputs] == ["text_output"]
    assert list(response.raw_output_contents) == [text("hello")]


def test_nothing_is_added_to_named_outputs_where_nobody_could_go_on() -> None:
    request = kserve.ModelInferRequest()
    request.outputs.add(name="text_output")
    Resumption(request, make_asked(), can_move=False)
    assert [output.name for output in request.outputs] == ["text_output"]


def test_a_stream_of_a_replica_that_sends_no_ids_cannot_go_on_after_a_loss() -> None:
    resumption = Resumption(kserve.ModelInferRequest(), make_asked())
    resumption.receive(response_with(text_output=text("hello")))
    assert not resumption.can_go_on_elsewhere()
    assert not resumption.lose()
