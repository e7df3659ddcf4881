from __future__ import annotations

from typing import Any

import pytest

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.request import GenerateRequest, parse_request


def parse(
    tensors: dict[str, list[Any]] | None = None, parameters: dict[str, Any] | None = None
) -> GenerateRequest:
    return parse_request(
        {"text_input": [b"hello"], **(tensors or {})}, parameters or {}, fresh_seed=11
    )


def test_a_bare_prompt_is_greedy_and_unstreamed() -> None:
    request = parse()
    assert request.text == "hello"
    assert request.sampling.temperature == 0.0
    assert request.sampling.seed == 11
    assert not request.is_stream
    assert not request.echo


def test_a_tensor_wins_over_sampling_parameters_and_those_over_parameters() -> None:
    tensors: dict[str, list[Any]] = {
        "sampling_parameters": [b'{"max_tokens": "5", "top_k": 3}'],
        "top_k": [2],
    }
    request = parse(tensors, {"max_tokens": 9, "temperature": 0.5})
    assert (request.sampling.top_k, request.max_tokens) == (2, 5)
    assert request.sampling.temperature == 0.5


def test_numbers_may_come_as_strings() -> None:
    request = parse(parameters={"max_tokens": "7", "temperature": "0.25", "stream": "true"})
    assert (request.max_tokens, request.sampling.temperature, request.is_stream) == (7, 0.25, True)


def test_both_names_of_the_seed_are_known() -> None:
    assert parse({"seed": [3]}).sampling.seed == 3
    assert parse({"random_seed": [4]}).sampling.seed == 4


def test_top_k_minus_one_is_off() -> None:
    assert parse(parameters={"top_k": -1}).sampling.top_k == 0


def test_stop_words_come_as_tensor_or_list_or_one_string() -> None:
    assert parse({"stop_words": [b"a", b"", b"b"]}).stop_words == ("a", "b")
    assert parse(parameters={"stop": ["x"]}).stop_words == ("x",)
    assert parse(parameters={"stop": "y"}).stop_words == ("y",)


def test_token_ids_replace_the_text() -> None:
    request = parse_request({"input_ids": [1, 2]}, {}, fresh_seed=0)
    assert (request.text, request.input_ids) == (None, (1, 2))


@pytest.mark.parametrize(
    ("tensors", "parameters", "message"),
    [
        ({"max_tokens": [0]}, {}, "'max_tokens' is 0; it must be at least 1."),
        ({"temperature": [-1.0]}, {}, "'temperature' is -1; it must be at least 0."),
        ({"temperature": [float("nan")]}, {}, "'temperature' is nan; it must be at least 0."),
        ({"top_p": [1.5]}, {}, "'top_p' is 1.5; it must be between 0 and 1."),
        ({"top_k": [1, 2]}, {}, "Input 'top_k' takes exactly one value."),
        ({}, {"max_tokens": "many"}, "'max_tokens' is 'many'; it takes a whole number."),
        ({}, {"temperature": "hot"}, "'temperature' is 'hot'; it takes a number."),
        ({}, {"stream": "maybe"}, "'stream' is 'maybe'; it takes true or false."),
        (
            {"sampling_parameters": [b"[1]"]},
            {},
            "'sampling_parameters' is not a JSON object in a string.",
        ),
        ({"text_input": [b"\xff"]}, {}, "'text_input' is not valid UTF-8."),
        ({"text_input": []}, {}, "Input 'text_input' is missing; it takes exactly one string."),
        ({"input_ids": [1]}, {}, "Give either 'text_input' or 'input_ids', not both."),
        ({"seed": [1 << 64]}, {}, "'seed' is 18446744073709551616; it must be below 2**64."),
    ],
)
def test_a_bad_setting_is_named(
    tensors: dict[str, list[Any]], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(tensors, parameters)
    assert str(caught.value) == message
