"""What a request carries from replica to replica."""

from __future__ import annotations

import struct

import pytest
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.protocol.request import GenerateRequest, WantedOutputs
from paraserve_backend.protocol.resume import HAND_OVER_TO, RESUME, Resume
from paraserve_backend.protocol.sampling import ChosenToken, Sampling
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


@pytest.mark.parametrize(
    "wanted",
    [
        WantedOutputs(logprobs=True),
        WantedOutputs(log_probs=True),
        WantedOutputs(cumulative_logprob=True),
    ],
)
def test_a_stream_with_log_probabilities_cannot_go_on_after_a_loss(wanted: WantedOutputs) -> None:
    resumption = Resumption(kserve.ModelInferRequest(), make_asked(wanted=wanted))
    assert resumption.lose()  # nothing was sent yet
    resumption.receive(tokens_response(1))
    assert not resumption.lose()


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
    assert [output.name for output in request.outputs] == ["text_output", HAND_OVER_TO, RESUME]
    # But nobody knows the ids of what it has got.
    resumption.receive(response_with(text_output=text("hello")))
    assert not resumption.lose()
