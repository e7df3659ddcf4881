"""Requests that ask for what cannot be, and what a gateway or a replica then says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from integration.support.refusals import Refusal
from paraserve_backend.errors import InvalidRequest, NotFound, ParaServeError
from paraserve_backend.protocol.request import UNSUPPORTED
from paraserve_backend.protocol.tensors import INPUTS, OUTPUTS

PROMPT: Mapping[str, tuple[str, Any]] = {"input_ids": ("INT32", [5, 6, 7])}


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRequest(Refusal):
    error: type[ParaServeError] = InvalidRequest
    model: str = ""
    version: str = ""
    inputs: Mapping[str, tuple[str, Any]] = field(default_factory=lambda: PROMPT)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BadBody(Refusal):
    error: type[ParaServeError] = InvalidRequest
    body: bytes


def _text(*words: str) -> tuple[str, list[bytes]]:
    return "BYTES", [word.encode() for word in words]


def _tensor(what: str, name: str, datatype: str, value: object, limits: str) -> BadRequest:
    """A setting in a tensor of one element."""
    says = f"'{name}' is {value}; it must be {limits}."
    return BadRequest(what=what, says=says, inputs={**PROMPT, name: (datatype, [value])})


def _parameter(what: str, name: str, value: object, says: str) -> BadRequest:
    return BadRequest(what=what, says=says, parameters={name: value})


_NAN, _INFINITE = float("nan"), float("inf")
_NAMES = ", ".join(spec.name for spec in INPUTS if spec.name not in UNSUPPORTED)

#: Refused by the gateway, before any replica is woken.
REQUESTS = (
    BadRequest(
        what="a model that is not deployed",
        says="Request for unknown model: 'nothing' is not found. Deployments: asleep, awake.",
        error=NotFound,
        model="nothing",
    ),
    BadRequest(
        what="a version that does not exist",
        says="Request for unknown model: 'asleep' version 2 is not found. Every deployment has "
        "version 1 only.",
        error=NotFound,
        version="2",
    ),
    # ---- tensors ----
    BadRequest(
        what="a tensor of an unknown name",
        says=f"Unexpected inference input 'prompt'; the inputs are {_NAMES}.",
        inputs={"prompt": _text("w5")},
    ),
    BadRequest(
        what="no prompt",
        says="Input 'text_input' is missing; it takes exactly one string.",
        inputs={"max_tokens": ("INT32", [4])},
    ),
    BadRequest(
        what="two prompts",
        says="Give either 'text_input' or 'input_ids', not both.",
        inputs={**PROMPT, "text_input": _text("w5")},
    ),
    BadRequest(
        what="a tensor of the wrong type",
        says="Input 'input_ids' has datatype INT64; expected INT32.",
        inputs={"input_ids": ("INT64", [5, 6])},
    ),
    BadRequest(
        what="a tensor of the wrong length",
        says="Unexpected shape for input 'text_input': expected [1], got [2].",
        inputs={"text_input": _text("w5", "w6")},
    ),
    BadRequest(
        what="a tensor of too many dimensions",
        says="Unexpected shape for input 'input_ids': expected [-1], got [1, 1, 2].",
        inputs={"input_ids": ("INT32", [[[5, 6]]])},
    ),
    BadRequest(
        what="an empty prompt of tokens",
        says="Input 'input_ids' is empty; give at least one token.",
        inputs={"input_ids": ("INT32", [])},
    ),
    BadRequest(
        what="a text that is not UTF-8",
        says="'text_input' is not valid UTF-8.",
        inputs={"text_input": ("BYTES", [b"\xff"])},
    ),
    BadRequest(
        what="an output of an unknown name",
        says="Unexpected inference output 'text'; the outputs are "
        f"{', '.join(spec.name for spec in OUTPUTS)}.",
        outputs=("text",),
    ),
    BadRequest(
        what="a stream from a call that has one response",
        says="A request with one response cannot have 'stream' true: use ModelStreamInfer (gRPC) "
        "or generate_stream (HTTP).",
        inputs={**PROMPT, "stream": ("BOOL", [True])},
    ),
    # ---- settings ----
    _tensor("a negative temperature", "temperature", "FP32", -1, "at least 0"),
    _tensor(
        "a temperature that is not a number", "temperature", "FP32", float("nan"), "at least 0"
    ),
    _tensor("an infinite temperature", "temperature", "FP32", float("inf"), "at least 0"),
    _tensor("a share of probability above 1", "top_p", "FP32", 1.5, "between 0 and 1"),
    _tensor("a negative share of probability", "min_p", "FP32", -0.5, "between 0 and 1"),
    _tensor("fewer than no tokens to choose from", "top_k", "INT32", -2, "at least -1"),
    _tensor("a penalty of zero", "repetition_penalty", "FP32", 0, "between 0.01 and 100"),
    _tensor("a penalty out of range", "presence_penalty", "FP32", 3, "between -2 and 2"),
    _tensor("no tokens wanted", "max_tokens", "INT32", 0, "at least 1"),
    BadRequest(
        what="more tokens at least than at most",
        says="'min_tokens' is 9; it must be at most 'max_tokens', 8.",
        inputs={**PROMPT, "min_tokens": ("INT32", [9]), "max_tokens": ("INT32", [8])},
    ),
    BadRequest(
        what="too many stop words",
        says="'stop_words' has 65 words; 64 at most.",
        inputs={**PROMPT, "stop_words": _text(*["w1"] * 65)},
    ),
    BadRequest(
        what="a stop word that is too long",
        says="'stop_words' has a word of more than 256 characters.",
        inputs={**PROMPT, "stop_words": _text("w" * 257)},
    ),
    _parameter(
        "a setting that is not a number",
        "temperature",
        "hot",
        "'temperature' is 'hot'; it takes a number.",
    ),
    _parameter(
        "a setting that is not a whole number",
        "max_tokens",
        "many",
        "'max_tokens' is 'many'; it takes a whole number.",
    ),
    _parameter(
        "a setting that is neither true nor false",
        "ignore_eos",
        "perhaps",
        "'ignore_eos' is 'perhaps'; it takes true or false.",
    ),
    _parameter("a seed below none", "seed", -2, "'seed' is -2; it must be at least -1."),
    _parameter(
        "sampling_parameters that are not JSON",
        "sampling_parameters",
        "top_p=1",
        "'sampling_parameters' is not a JSON object in a string.",
    ),
    _parameter(
        "an unknown setting in sampling_parameters",
        "sampling_parameters",
        '{"temprature": 1}',
        "'sampling_parameters' has an unknown setting 'temprature'.",
    ),
    _parameter(
        "a way to decode that we do not have",
        "beam_width",
        4,
        "'beam_width' asks for beam search, which is not supported; leave it out.",
    ),
    BadRequest(
        what="a prompt that is longer than the context",
        says="The prompt has 256 tokens; the context of 'asleep' holds 256, and at least one of "
        "them is for the answer, so send less.",
        inputs={"input_ids": ("INT32", [5] * 256)},
    ),
)

#: Only a replica knows: these need one that runs.
REPLICA_REQUESTS = (
    BadRequest(
        what="a token that is not in the vocabulary",
        says="Token ids must be in [0, 199).",
        inputs={"input_ids": ("INT32", [5, 199])},
    ),
    BadRequest(
        what="a negative token",
        says="Token ids must be in [0, 199).",
        inputs={"input_ids": ("INT32", [-1])},
    ),
    BadRequest(
        what="an end token that is not in the vocabulary",
        says="Token ids must be in [0, 199).",
        inputs={**PROMPT, "end_id": ("INT32", [199])},
    ),
    BadRequest(
        what="a text without any token",
        says="The prompt is empty; give 'text_input' at least one token.",
        inputs={"text_input": _text("")},
    ),
)

#: Bodies of `generate`, which Triton's clients cannot send.
BODIES = (
    BadBody(
        what="a body that is not JSON",
        says="The request body is not valid JSON: Expecting property name enclosed in double "
        "quotes at byte 1.",
        body=b"{",
    ),
    BadBody(
        what="a body that is not an object",
        says="The request body must be a JSON object.",
        body=b"[]",
    ),
    BadBody(
        what="a number that JSON does not have",
        says="The request body is not valid JSON: NaN is no JSON number.",
        body=b'{"text_input": "w5", "temperature": NaN}',
    ),
    BadBody(
        what="a number for a text",
        says="Input 'text_input' takes BYTES values, not a number.",
        body=b'{"text_input": 5}',
    ),
    BadBody(
        what="a list of lists for a number",
        says="Input 'max_tokens' takes INT32 values, not [1].",
        body=b'{"text_input": "w5", "max_tokens": [[1]]}',
    ),
    BadBody(
        what="a text for token ids",
        says="Input 'input_ids' takes INT32 values, not a string.",
        body=b'{"input_ids": "1,2"}',
    ),
    BadBody(
        what="a number of very many digits",
        says="The request body has a whole number of 5000 digits; 100 at most.",
        body=b'{"text_input": "w5", "max_tokens": ' + b"7" * 5000 + b"}",
    ),
    BadBody(
        what="JSON that is nested very deeply",
        says="The request body is nested too deeply; 32 levels at most.",
        body=b'{"text_input": "w5", "x": ' + b"[" * 5000,
    ),
    BadBody(
        what="very many keys",
        says="The request has 301 keys in one place; 256 at most.",
        body=b'{"text_input": "w5"' + b"".join(b', "k%d": 1' % n for n in range(300)) + b"}",
    ),
    BadBody(
        what="a name that is between our own processes",
        says="The name 'command' is reserved for ParaServe's own processes; leave it out.",
        body=b'{"text_input": "w5", "command": "{}"}',
    ),
    BadBody(
        what="a name of Triton's own",
        says="The name 'triton_x' is reserved for Triton itself; leave it out.",
        body=b'{"text_input": "w5", "triton_x": 1}',
    ),
)
