"""The table of supported architectures, and the way from config.json to a model's specification."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from paraserve_backend.architectures.config_json import Config, check_not_quantized
from paraserve_backend.architectures.families.falcon import read_falcon
from paraserve_backend.architectures.families.gemma2 import read_gemma2
from paraserve_backend.architectures.families.llama import read_llama
from paraserve_backend.architectures.families.mistral import read_mistral
from paraserve_backend.architectures.families.opt import read_opt
from paraserve_backend.architectures.families.phi3 import read_phi3
from paraserve_backend.architectures.families.qwen import read_qwen2, read_qwen3
from paraserve_backend.architectures.spec import ModelSpec
from paraserve_backend.errors import UnsupportedModel

#: Architecture as config.json spells it, to what reads the rest of that config.
FAMILIES: Mapping[str, Callable[[Config, str], ModelSpec]] = {
    "FalconForCausalLM": read_falcon,
    "Gemma2ForCausalLM": read_gemma2,
    "LlamaForCausalLM": read_llama,
    "MistralForCausalLM": read_mistral,
    "OPTForCausalLM": read_opt,
    "Phi3ForCausalLM": read_phi3,
    "Qwen2ForCausalLM": read_qwen2,
    "Qwen3ForCausalLM": read_qwen3,
}


def model_spec(
    config: Mapping[str, object], generation_config: Mapping[str, object] | None = None
) -> ModelSpec:
    """Read a parsed config.json and, where there is one, generation_config.json.

    Raises:
        UnsupportedModel: the architecture, or a variant of it, is not one we can run.
        InvalidCheckpoint: a field is missing or makes no sense.
    """
    fields = Config(config)
    spec = _read_family(fields)
    # Chat models often list more end tokens here than in config.json.
    end_ids = Config(generation_config or {}, "generation_config.json").token_ids("eos_token_id")
    return replace(spec, eos_token_ids=end_ids) if end_ids else spec


def _read_family(fields: Config) -> ModelSpec:
    architectures = fields.texts("architectures")
    for architecture in architectures:
        if architecture in FAMILIES:
            check_not_quantized(fields)
            return FAMILIES[architecture](fields, architecture)
    named = ", ".join(architectures) or "(none)"
    supported = ", ".join(sorted(FAMILIES))
    raise UnsupportedModel(f"Architecture {named} is not supported; supported are {supported}.")
