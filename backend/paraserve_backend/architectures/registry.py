"""The table of supported families, and the way from config.json to a model's specification."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from paraserve_backend.architectures.config_json import STORED_DTYPE, Config, check_not_quantized
from paraserve_backend.architectures.families import (
    falcon,
    gemma2,
    llama,
    mistral,
    opt,
    phi3,
    qwen,
)
from paraserve_backend.architectures.spec import Dtype, ModelSpec
from paraserve_backend.errors import UnsupportedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What reads the config.json of a family.

    `model_type` is the field by which transformers chooses the configuration class, `defaults`
    is what that class has where config.json is silent. End tokens have no default there: whatever
    the class says, transformers generates without one where config.json names none.
    """

    model_type: str
    defaults: Mapping[str, object]
    read: Callable[[Config, str], ModelSpec]


#: Families by their architecture, as config.json spells it.
FAMILIES: Mapping[str, Family] = {
    "FalconForCausalLM": Family(
        model_type="falcon", defaults=falcon.DEFAULTS, read=falcon.read_falcon
    ),
    "Gemma2ForCausalLM": Family(
        model_type="gemma2", defaults=gemma2.DEFAULTS, read=gemma2.read_gemma2
    ),
    "LlamaForCausalLM": Family(model_type="llama", defaults=llama.DEFAULTS, read=llama.read_llama),
    "MistralForCausalLM": Family(
        model_type="mistral", defaults=mistral.DEFAULTS, read=mistral.read_mistral
    ),
    "OPTForCausalLM": Family(model_type="opt", defaults=opt.DEFAULTS, read=opt.read_opt),
    "Phi3ForCausalLM": Family(model_type="phi3", defaults=phi3.DEFAULTS, read=phi3.read_phi3),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2", defaults=qwen.QWEN2_DEFAULTS, read=qwen.read_qwen2
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3", defaults=qwen.QWEN3_DEFAULTS, read=qwen.read_qwen3
    ),
}
_BY_MODEL_TYPE = {family.model_type: name for name, family in FAMILIES.items()}
#: Early conversions spell it `LLaMAForCausalLM`.
_BY_LOWER_CASE = {name.lower(): name for name in FAMILIES}


def model_spec(
    config: Mapping[str, object],
    generation_config: Mapping[str, object] | None = None,
    *,
    tensors: Collection[str] = (),
    dtype: Dtype | None = None,
) -> ModelSpec:
    """Read a parsed config.json and, where there is one, generation_config.json.

    Args:
        config: config.json.
        generation_config: its end tokens count before those of `config`.
        tensors: the names of those that are stored: a head that is there is used, even if
            `config` ties it to the embedding. A stage may know its own tensors only.
        dtype: the type in which the weights are stored, for a config that names none.

    Raises:
        UnsupportedModel: the architecture, or a variant of it, is not one we can run.
        InvalidCheckpoint: a field is missing or makes no sense.
    """
    architecture = _architecture(Config(config))
    family = FAMILIES[architecture]
    fields = Config(config, defaults={**family.defaults, STORED_DTYPE: dtype})
    check_not_quantized(fields)
    spec = _with_stored_head(family.read(fields, architecture), tensors)
    # Chat models often list more end tokens here than in config.json.
    generation = Config(generation_config or {}, "generation_config.json")
    if not generation.has("eos_token_id"):
        return spec
    return replace(spec, eos_token_ids=generation.token_ids("eos_token_id"))


def _architecture(fields: Config) -> str:
    """The family as transformers finds it: `model_type` decides; `architectures` may be absent."""
    named = fields.texts("architectures") if fields.has("architectures") else ()
    known = [_BY_LOWER_CASE[name.lower()] for name in named if name.lower() in _BY_LOWER_CASE]
    if known or not named:
        model_type = fields.text("model_type", "")
        if model_type in _BY_MODEL_TYPE:
            return _BY_MODEL_TYPE[model_type]
        if known:
            return known[0]
        named = (model_type,) if model_type else ("(none)",)
    supported = ", ".join(sorted(FAMILIES))
    raise UnsupportedModel(
        f"Architecture {', '.join(named)} is not supported; supported are {supported}."
    )


def _with_stored_head(spec: ModelSpec, tensors: Collection[str]) -> ModelSpec:
    """What transformers does with a head that is stored though it is said to be the embedding."""
    head, embedding = spec.names.head, spec.names.embedding[0]
    if not spec.tie_word_embeddings or head not in tensors:
        return spec
    if embedding in tensors:
        # Whether both are equal could only be told from all their bytes.
        return replace(spec, tie_word_embeddings=False)
    names = replace(spec.names, embedding=(head, *spec.names.embedding[1:]))
    return replace(spec, names=names)
