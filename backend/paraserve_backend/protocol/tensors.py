"""The input and output tensors of a deployment, in one table.

The config templates, the backend and the gateway's metadata are made from it. Names are those of
Triton's vLLM and TensorRT-LLM backends; docs/protocol.md explains each.
"""

from __future__ import annotations

from dataclasses import dataclass

from paraserve_backend.protocol.resume import HAND_OVER_TO, RESUME


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    name: str
    #: KServe v2 datatype: BYTES, BOOL, INT32, INT64, UINT32, UINT64, FP32.
    datatype: str
    shape: tuple[int, ...] = (1,)
    optional: bool = True

    @property
    def config_datatype(self) -> str:
        """The same datatype as config.pbtxt spells it."""
        return "TYPE_STRING" if self.datatype == "BYTES" else f"TYPE_{self.datatype}"


INPUTS: tuple[TensorSpec, ...] = (
    TensorSpec(name="text_input", datatype="BYTES"),
    TensorSpec(name="input_ids", datatype="INT32", shape=(-1,)),
    TensorSpec(name="stream", datatype="BOOL"),
    TensorSpec(name="exclude_input_in_output", datatype="BOOL"),
    TensorSpec(name="sampling_parameters", datatype="BYTES"),
    # How to choose tokens.
    TensorSpec(name="temperature", datatype="FP32"),
    TensorSpec(name="top_k", datatype="INT32"),
    TensorSpec(name="top_p", datatype="FP32"),
    TensorSpec(name="min_p", datatype="FP32"),
    TensorSpec(name="repetition_penalty", datatype="FP32"),
    TensorSpec(name="presence_penalty", datatype="FP32"),
    TensorSpec(name="frequency_penalty", datatype="FP32"),
    TensorSpec(name="seed", datatype="UINT64"),
    TensorSpec(name="random_seed", datatype="UINT64"),
    TensorSpec(name="bad_words", datatype="BYTES", shape=(-1,)),
    # When to stop.
    TensorSpec(name="max_tokens", datatype="INT32"),
    TensorSpec(name="min_tokens", datatype="INT32"),
    TensorSpec(name="min_length", datatype="INT32"),
    TensorSpec(name="stop_words", datatype="BYTES", shape=(-1,)),
    TensorSpec(name="end_id", datatype="INT32"),
    TensorSpec(name="ignore_eos", datatype="BOOL"),
    # What to return besides the text.
    TensorSpec(name="return_finish_reason", datatype="BOOL"),
    TensorSpec(name="return_cumulative_logprob", datatype="BOOL"),
    TensorSpec(name="return_logprobs", datatype="BOOL"),
    TensorSpec(name="return_num_input_tokens", datatype="BOOL"),
    TensorSpec(name="return_num_output_tokens", datatype="BOOL"),
    TensorSpec(name="return_log_probs", datatype="BOOL"),
    # Without effect, or taken at their defaults alone: clients of TensorRT-LLM send them anyway.
    TensorSpec(name="pad_id", datatype="INT32"),
    TensorSpec(name="length_penalty", datatype="FP32"),
    TensorSpec(name="beam_width", datatype="INT32"),
    TensorSpec(name="num_return_sequences", datatype="INT32"),
    TensorSpec(name="return_context_logits", datatype="BOOL"),
    TensorSpec(name="return_generation_logits", datatype="BOOL"),
    TensorSpec(name="return_perf_metrics", datatype="BOOL"),
    TensorSpec(name="num_draft_tokens", datatype="INT32"),
    TensorSpec(name="use_draft_logits", datatype="BOOL"),
)

OUTPUTS: tuple[TensorSpec, ...] = (
    TensorSpec(name="text_output", datatype="BYTES", shape=(-1,)),
    TensorSpec(name="output_ids", datatype="INT32", shape=(-1,)),
    TensorSpec(name="finish_reason", datatype="BYTES"),
    TensorSpec(name="num_input_tokens", datatype="UINT32"),
    TensorSpec(name="num_output_tokens", datatype="UINT32"),
    TensorSpec(name="cumulative_logprob", datatype="FP32"),
    TensorSpec(name="logprobs", datatype="BYTES"),
    TensorSpec(name="cum_log_probs", datatype="FP32"),
    TensorSpec(name="output_log_probs", datatype="FP32", shape=(1, -1)),
)

#: Of the response that moves a request to another replica; no client sees it.
HAND_OVER_OUTPUTS: tuple[TensorSpec, ...] = (
    TensorSpec(name=HAND_OVER_TO, datatype="BYTES"),
    TensorSpec(name=RESUME, datatype="BYTES"),
)
