"""One response as the output tensors of the interface; knows no Triton.

A flag of the request adds its tensor to every response. Without flags, only the last response has
the finish reason and the counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from paraserve_backend.generation.answer import Delta, RankedToken
from paraserve_backend.protocol.request import WantedOutputs
from paraserve_backend.protocol.tensors import OUTPUTS

_NUMPY: Mapping[str, type] = {
    "BYTES": np.object_,
    "INT32": np.int32,
    "UINT32": np.uint32,
    "FP32": np.float32,
}
_DTYPES = {spec.name: _NUMPY[spec.datatype] for spec in OUTPUTS}


def output_tensors(delta: Delta, wanted: WantedOutputs) -> dict[str, npt.NDArray[Any]]:
    """Return each output's elements by name, in the interface's datatypes and shapes."""
    values: dict[str, Any] = {"text_output": [delta.text.encode()], "output_ids": delta.token_ids}
    is_last = delta.finish_reason is not None
    if is_last or wanted.finish_reason:
        # "None" is what vLLM's clients look for before the last response.
        values["finish_reason"] = [str(delta.finish_reason).encode()]
    if is_last or wanted.num_input_tokens:
        values["num_input_tokens"] = [delta.num_input_tokens]
    if wanted.num_output_tokens:
        # Clients that ask for it add it up.
        values["num_output_tokens"] = [len(delta.token_ids)]
    elif is_last:
        values["num_output_tokens"] = [delta.num_output_tokens]
    values.update(_logprobs(delta, wanted))
    return {name: np.array(value, _DTYPES[name]) for name, value in values.items()}


def _logprobs(delta: Delta, wanted: WantedOutputs) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if wanted.cumulative_logprob:
        values["cumulative_logprob"] = [delta.cumulative_logprob]
    if wanted.logprobs:
        # "null" where the request names no number of log-probabilities, as vLLM answers.
        ranked = [_entries(tokens) for tokens in delta.ranked] or None
        values["logprobs"] = [json.dumps(ranked).encode()]
    if wanted.log_probs:
        values["cum_log_probs"] = [delta.cumulative_logprob]
        values["output_log_probs"] = [delta.logprobs]
    return values


def _entries(tokens: Iterable[RankedToken]) -> dict[str, Any]:
    return {
        str(token.token_id): {
            "logprob": token.logprob,
            "rank": token.rank,
            "decoded_token": token.text,
        }
        for token in tokens
    }
