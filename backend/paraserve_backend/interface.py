"""The tensors a deployment takes and gives: one table for the config templates, the backend and
the gateway's metadata. Names are those of Triton's vLLM and TensorRT-LLM backends.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    TensorSpec(name="max_tokens", datatype="INT32"),
    TensorSpec(name="temperature", datatype="FP32"),
    TensorSpec(name="top_k", datatype="INT32"),
    TensorSpec(name="top_p", datatype="FP32"),
    TensorSpec(name="seed", datatype="UINT64"),
    TensorSpec(name="random_seed", datatype="UINT64"),
    TensorSpec(name="stop_words", datatype="BYTES", shape=(-1,)),
    TensorSpec(name="ignore_eos", datatype="BOOL"),
    TensorSpec(name="exclude_input_in_output", datatype="BOOL"),
    TensorSpec(name="sampling_parameters", datatype="BYTES"),
)

OUTPUTS: tuple[TensorSpec, ...] = (
    TensorSpec(name="text_output", datatype="BYTES", shape=(-1,)),
    TensorSpec(name="output_ids", datatype="INT32", shape=(-1,)),
    TensorSpec(name="finish_reason", datatype="BYTES"),
    TensorSpec(name="num_input_tokens", datatype="UINT32"),
    TensorSpec(name="num_output_tokens", datatype="UINT32"),
)
