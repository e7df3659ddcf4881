from __future__ import annotations

from typing import Any

import pytest

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.request import (
    UNSUPPORTED,
    GenerateRequest,
    WantedOutputs,
    parse_request,
)
from paraserve_backend.protocol.sampling import Steering


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


def test_what_genai_perf_sends_to_vllm_is_understood() -> None:
    text = b'{"max_tokens": "24", "min_tokens": "24", "ignore_eos": true, "temperature": "0"}'
    tensors: dict[str, list[Any]] = {
        "stream": [True],
        "exclude_input_in_output": [True],
        "sampling_parameters": [text],
    }
    request = parse(tensors)
    assert (request.max_tokens, request.min_tokens, request.ignore_eos) == (24, 24, True)
    assert (request.is_stream, request.echo) == (True, False)


def test_what_a_client_of_tensorrt_llm_sends_is_understood() -> None:
    tensors: dict[str, list[Any]] = {
        "max_tokens": [20],
        "bad_words": [b""],
        "stop_words": [b""],
        "pad_id": [2],
        "end_id": [2],
        "top_k": [1],
        "top_p": [0.0],
        "temperature": [1.0],
        "length_penalty": [1.0],
        "repetition_penalty": [1.0],
        "min_length": [1],
        "presence_penalty": [0.0],
        "frequency_penalty": [0.0],
        "random_seed": [0],
        "return_log_probs": [True],
        "beam_width": [1],
        "num_return_sequences": [1],
        "return_context_logits": [False],
        "stream": [True],
    }
    request = parse(tensors)
    assert (request.max_tokens, request.min_tokens, request.end_id) == (20, 1, 2)
    assert (request.stop_words, request.bad_words) == ((), ())
    assert request.sampling.steering is None
    assert request.wanted == WantedOutputs(log_probs=True)


def test_both_names_of_the_seed_are_known() -> None:
    assert parse({"seed": [3]}).sampling.seed == 3
    assert parse({"random_seed": [4]}).sampling.seed == 4


def test_seed_minus_one_is_none() -> None:
    assert parse(parameters={"seed": -1}).sampling.seed == 11


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({}, 0.0),
        ({"top_k": 40}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"min_p": 0.1}, 1.0),
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.0}, 0.0),
        ({"top_k": 40, "temperature": 0}, 0.0),
    ],
)
def test_a_filter_without_a_temperature_means_sampling(
    settings: dict[str, Any], temperature: float
) -> None:
    assert parse(parameters=settings).sampling.temperature == temperature


def test_penalties_and_min_p_steer_the_sampling() -> None:
    parameters = {
        "min_p": 0.05,
        "repetition_penalty": "1.2",
        "presence_penalty": -2,
        "frequency_penalty": 2.0,
    }
    assert parse(parameters=parameters).sampling.steering == Steering(
        min_p=0.05, repetition_penalty=1.2, presence_penalty=-2.0, frequency_penalty=2.0
    )


def test_log_probabilities_are_ranked_only_for_those_who_will_see_them() -> None:
    parameters = {"logprobs": 3}
    assert parse(parameters=parameters).sampling.steering is None
    steering = parse({"return_logprobs": [True]}, parameters).sampling.steering
    assert steering == Steering(num_logprobs=3)
    assert parse({"return_logprobs": [True]}, {"logprobs": False}).sampling.steering is None


def test_every_flag_asks_for_its_output() -> None:
    flags = {
        "return_finish_reason": [True],
        "return_num_input_tokens": [True],
        "return_num_output_tokens": [True],
        "return_cumulative_logprob": [True],
        "return_logprobs": [True],
        "return_log_probs": [True],
    }
    assert parse(flags).wanted == WantedOutputs(
        finish_reason=True,
        num_input_tokens=True,
        num_output_tokens=True,
        cumulative_logprob=True,
        logprobs=True,
        log_probs=True,
    )


def test_both_names_of_the_shortest_answer_are_known() -> None:
    assert parse({"min_tokens": [3]}).min_tokens == 3
    assert parse({"min_length": [4]}).min_tokens == 4


def test_stop_token_ids_come_in_a_list() -> None:
    tensors: dict[str, list[Any]] = {"sampling_parameters": [b'{"stop_token_ids": [7, "8"]}']}
    assert parse(tensors).stop_token_ids == (7, 8)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_taken_at_its_default_alone(name: str) -> None:
    default, what = UNSUPPORTED[name]
    parse(parameters={name: default})
    parse(parameters={name: str(default) if default is not None else ""})
    with pytest.raises(InvalidRequest) as caught:
        parse(parameters={name: not default if isinstance(default, bool) else 2})
    assert str(caught.value) == f"'{name}' asks for {what}, which is not supported; leave it out."


def test_top_k_minus_one_is_off() -> None:
    assert parse(parameters={"top_k": -1}).sampling.top_k == 0


def test_stop_words_come_as_tensor_or_list_or_one_string() -> None:
    assert parse({"stop_words": [b"a", b"", b"b"]}).stop_words == ("a", "b")
    assert parse(parameters={"stop": ["x"]}).stop_words == ("x",)
    assert parse(parameters={"stop": "y"}).stop_words == ("y",)
    assert parse({"stop_words": [b""]}, {"stop": "z"}).stop_words == ("z",)


def test_bad_words_come_as_tensor_or_list() -> None:
    assert parse({"bad_words": [b"a", b"", b"b"]}).bad_words == ("a", "b")
    assert parse(parameters={"bad_words": ["x"]}).bad_words == ("x",)


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
        (
            {},
            {"seed": 1 << 64},
            "'seed' is 18446744073709551616; it must be at most 18446744073709551615.",
        ),
        ({"seed": [-2]}, {}, "'seed' is -2; it must be at least -1."),
        ({}, {"random_seed": "x"}, "'random_seed' is 'x'; it takes a whole number."),
        ({"top_k": [-2]}, {}, "'top_k' is -2; it must be at least -1."),
        ({}, {"top_k": 1 << 31}, "'top_k' is 2147483648; it must be at most 2147483647."),
        ({}, {"top_k": 1.5}, "'top_k' is 1.5; it takes a whole number."),
        ({}, {"top_k": True}, "'top_k' is True; it takes a whole number."),
        ({"temperature": [float("inf")]}, {}, "'temperature' is inf; it must be at least 0."),
        ({}, {"temperature": True}, "'temperature' is True; it takes a number."),
        ({"top_p": [-0.1]}, {}, "'top_p' is -0.1; it must be between 0 and 1."),
        ({"min_p": [1.1]}, {}, "'min_p' is 1.1; it must be between 0 and 1."),
        (
            {"repetition_penalty": [0.0]},
            {},
            "'repetition_penalty' is 0; it must be between 0.01 and 100.",
        ),
        (
            {"presence_penalty": [2.5]},
            {},
            "'presence_penalty' is 2.5; it must be between -2 and 2.",
        ),
        (
            {"frequency_penalty": [-3.0]},
            {},
            "'frequency_penalty' is -3; it must be between -2 and 2.",
        ),
        ({"min_tokens": [-1]}, {}, "'min_tokens' is -1; it must be at least 0."),
        (
            {"min_length": [9], "max_tokens": [8]},
            {},
            "'min_tokens' is 9; it must be at most 'max_tokens', 8.",
        ),
        (
            {},
            {"max_tokens": 1 << 40},
            "'max_tokens' is 1099511627776; it must be at most 2147483647.",
        ),
        ({"end_id": [-2]}, {}, "'end_id' is -2; it must be at least -1."),
        ({}, {"logprobs": 21}, "'logprobs' is 21; it must be at most 20."),
        ({}, {"logprobs": -1}, "'logprobs' is -1; it must be at least 0."),
        ({}, {"stream": 2}, "'stream' is 2; it takes true or false."),
        ({}, {"ignore_eos": "9" * 99}, f"'ignore_eos' is '{'9' * 56}...; it takes true or false."),
        ({}, {"length_penalty": "long"}, "'length_penalty' is 'long'; it takes a number."),
        ({"stop_words": [b"x"] * 65}, {}, "'stop_words' has 65 words; 64 at most."),
        ({"bad_words": [b"x" * 257]}, {}, "'bad_words' has a word of more than 256 characters."),
        ({}, {"stop": [5]}, "'stop' takes a string."),
        ({"bad_words": [b"\xff"]}, {}, "'bad_words' is not valid UTF-8."),
        ({}, {"stop_token_ids": ["a"]}, "'stop_token_ids' is 'a'; it takes a whole number."),
        ({}, {"stop_token_ids": [1] * 65}, "'stop_token_ids' has 65 tokens; 64 at most."),
        (
            {"sampling_parameters": [b'{"temprature": 1}']},
            {},
            "'sampling_parameters' has an unknown setting 'temprature'.",
        ),
        (
            {"sampling_parameters": [b"[" * 16_385]},
            {},
            "'sampling_parameters' has 16385 bytes; 16384 at most.",
        ),
        (
            {"sampling_parameters": [b"[" * 16_000]},
            {},
            "'sampling_parameters' is nested too deeply; 32 levels at most.",
        ),
        (
            {"sampling_parameters": [b'{"guided_decoding": ' + b"[" * 40 + b"]" * 40 + b"}"]},
            {},
            "'sampling_parameters' is nested too deeply; 32 levels at most.",
        ),
        (
            {"sampling_parameters": [b'{"max_tokens": ' + b"7" * 5000 + b"}"]},
            {},
            "'sampling_parameters' has a whole number of 5000 digits; 100 at most.",
        ),
        (
            {"sampling_parameters": [b'{"' + b"k" * 5000 + b'": 1}']},
            {},
            f"'sampling_parameters' has an unknown setting '{'k' * 56}....",
        ),
        (
            {"sampling_parameters": [b'{"command": 1}']},
            {},
            "'sampling_parameters' has an unknown setting 'command'.",
        ),
        (
            {"sampling_parameters": [rb'{"\ud83c": 1}']},
            {},
            r"'sampling_parameters' has an unknown setting '\ud83c'.",
        ),
        (
            {"sampling_parameters": [rb'{"stop": ["\ud83c"]}']},
            {},
            "'stop' has half a surrogate pair in its text.",
        ),
        ({}, {"max_tokens": "8_0"}, "'max_tokens' is '8_0'; it takes a whole number."),
        ({}, {"temperature": b"1_0"}, "'temperature' is b'1_0'; it takes a number."),
        (
            {},
            {"temperature": "0." + "1" * 5000},
            f"'temperature' is '0.{'1' * 54}...; it takes a number.",
        ),
        ({}, {"n": [1] * 65}, "'n' has 65 values; 64 at most."),
        (
            {"beam_width": [4]},
            {},
            "'beam_width' asks for beam search, which is not supported; leave it out.",
        ),
    ],
)
def test_a_bad_setting_is_named(
    tensors: dict[str, list[Any]], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(tensors, parameters)
    assert str(caught.value) == message
