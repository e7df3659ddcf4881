from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from paraserve_backend.generation.answer import Answer, Delta
from paraserve_backend.generation.text import Detokenizer, StopWords
from paraserve_backend.protocol.request import WantedOutputs
from paraserve_backend.protocol.sampling import ChosenToken, Ranking
from paraserve_backend.protocol.tensors import INPUTS, OUTPUTS, TensorSpec
from paraserve_backend.tritonserver.stub.outputs import output_tensors

WORDS = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
ALL = WantedOutputs(
    finish_reason=True,
    num_input_tokens=True,
    num_output_tokens=True,
    cumulative_logprob=True,
    logprobs=True,
    log_probs=True,
)
NUMPY = {"BYTES": np.object_, "INT32": np.int32, "UINT32": np.uint32, "FP32": np.float32}


def make_answer(
    *, is_stream: bool = True, stop_words: tuple[str, ...] = (), min_tokens: int = 0
) -> Answer:
    return Answer(
        detokenizer=Detokenizer(WORDS, [0]),
        stop_words=StopWords(stop_words),
        is_stream=is_stream,
        prefix="",
        num_input_tokens=5,
        min_tokens=min_tokens,
    )


def chosen(token_id: int, logprob: float = -0.5, ranking: Ranking | None = None) -> ChosenToken:
    return ChosenToken(token_id=token_id, logprob=logprob, ranking=ranking)


def deltas(answer: Answer, tokens: list[ChosenToken], reason: str = "length") -> list[Delta]:
    """Everything the answer sends when these tokens come."""
    last = len(tokens) - 1
    sent = [answer.add(token, reason if i == last else None) for i, token in enumerate(tokens)]
    return [delta for delta in sent if delta is not None]


def values(delta: Delta, wanted: WantedOutputs) -> dict[str, Any]:
    return {name: array.tolist() for name, array in output_tensors(delta, wanted).items()}


def test_without_flags_the_last_response_alone_has_the_reason_and_the_totals() -> None:
    first, last = deltas(make_answer(), [chosen(1), chosen(2)])
    assert values(first, WantedOutputs()) == {"text_output": [b" b"], "output_ids": [1]}
    assert values(last, WantedOutputs()) == {
        "text_output": [b" c"],
        "output_ids": [2],
        "finish_reason": [b"length"],
        "num_input_tokens": [5],
        "num_output_tokens": [2],
    }


def test_with_flags_every_response_has_all_that_was_asked_for() -> None:
    sent = deltas(make_answer(), [chosen(1, -0.5), chosen(2, -0.25)])
    first, last = (values(delta, ALL) for delta in sent)
    assert first.keys() == last.keys() == {spec.name for spec in OUTPUTS}
    assert (first["finish_reason"], last["finish_reason"]) == ([b"None"], [b"length"])
    # Of this response alone: clients add them up.
    assert (first["num_output_tokens"], last["num_output_tokens"]) == ([1], [1])
    assert (first["num_input_tokens"], last["num_input_tokens"]) == ([5], [5])
    for name in ("cumulative_logprob", "cum_log_probs"):
        assert (first[name], last[name]) == ([-0.5], [-0.75])
    assert (first["output_log_probs"], last["output_log_probs"]) == ([[-0.5]], [[-0.25]])


def test_an_unstreamed_response_has_all_tokens() -> None:
    (delta,) = deltas(make_answer(is_stream=False), [chosen(1, -0.5), chosen(2, -0.25)])
    got = values(delta, ALL)
    assert (got["num_output_tokens"], got["output_log_probs"]) == ([2], [[-0.5, -0.25]])


def test_log_probabilities_are_json_as_vllm_has_it() -> None:
    ranking = Ranking(rank=2, token_ids=(0, 1), logprobs=(-0.25, -0.5))
    (delta,) = deltas(make_answer(), [chosen(1, -0.5, ranking)])
    (text,) = values(delta, ALL)["logprobs"]
    assert json.loads(text) == [
        {
            "1": {"logprob": -0.5, "rank": 2, "decoded_token": "b"},
            "0": {"logprob": -0.25, "rank": 1, "decoded_token": "a"},
        }
    ]


def test_log_probabilities_without_a_number_are_null_as_vllm_has_it() -> None:
    (delta,) = deltas(make_answer(), [chosen(1)])
    assert values(delta, ALL)["logprobs"] == [b"null"]


@pytest.mark.parametrize("spec", OUTPUTS, ids=lambda spec: spec.name)
def test_every_output_has_the_datatype_and_shape_of_the_interface(spec: TensorSpec) -> None:
    (delta,) = deltas(make_answer(is_stream=False), [chosen(1), chosen(2)])
    array = output_tensors(delta, ALL)[spec.name]
    assert array.dtype == NUMPY[spec.datatype]
    assert array.ndim == len(spec.shape)
    assert all(want in (-1, have) for want, have in zip(spec.shape, array.shape, strict=True))


def test_a_token_that_ends_the_answer_counts_but_is_no_text() -> None:
    last = deltas(make_answer(), [chosen(1), chosen(2)], reason="stop")[-1]
    assert (last.text, last.token_ids, last.num_output_tokens) == ("", (2,), 2)
    assert last.finish_reason == "stop"


def test_a_stop_word_does_not_end_an_answer_that_is_too_short() -> None:
    tokens = [chosen(1), chosen(1), chosen(1)]
    sent = deltas(make_answer(stop_words=("b",), min_tokens=2), tokens)
    assert "".join(delta.text for delta in sent) == " b b "
    assert [delta.finish_reason for delta in sent] == [None, None, "stop"]


def test_every_tensor_is_documented() -> None:
    text = (Path(__file__).parents[4] / "docs" / "protocol.md").read_text(encoding="utf-8")
    names = [spec.name for spec in (*INPUTS, *OUTPUTS)]
    assert [name for name in names if f"`{name}`" not in text] == []
