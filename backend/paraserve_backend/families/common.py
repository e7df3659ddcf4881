"""The decoder most families share: rotary positions, RMS norms, a gated SiLU MLP, Llama's names.

A family file calls `read_spec` and replaces in its result what it does differently.
"""

from __future__ import annotations

from collections.abc import Collection

from paraserve_backend.contract import Dtype, TensorNames
from paraserve_backend.errors import UnsupportedModel
from paraserve_backend.families.config import Config
from paraserve_backend.families.spec import (
    LayerTensor,
    LinearScaling,
    Llama3Scaling,
    ModelSpec,
    Parameter,
    Rope,
)

QKV_BIASES = frozenset({Parameter.QUERY_BIAS, Parameter.KEY_BIAS, Parameter.VALUE_BIAS})
ATTENTION_BIASES = QKV_BIASES | {Parameter.OUTPUT_BIAS}
MLP_BIASES = frozenset({Parameter.GATE_BIAS, Parameter.UP_BIAS, Parameter.DOWN_BIAS})
QK_NORMS = frozenset({Parameter.QUERY_NORM, Parameter.KEY_NORM})
_OPTIONAL = ATTENTION_BIASES | MLP_BIASES | QK_NORMS

#: What transformers assumes where an old config.json names no base frequency.
_DEFAULT_THETA = 10_000.0

_NAMES = TensorNames(
    layer_prefix="model.layers.",
    embedding=("model.embed_tokens.weight",),
    final=("model.norm.weight",),
    head="lm_head.weight",
)


def read_spec(
    config: Config, architecture: str, *, optional: Collection[Parameter] = ()
) -> ModelSpec:
    """The spec of a model laid out like Llama whose layers also have the `optional` parameters."""
    _check_plain(config, architecture)
    num_heads = config.count("num_attention_heads")
    num_kv_heads = _read_kv_heads(config, num_heads)
    head_dim = _read_head_dim(config, num_heads)
    hidden_size = config.count("hidden_size")
    intermediate_size = config.count("intermediate_size")
    num_layers = config.count("num_hidden_layers")
    tensors = _layer_tensors(
        hidden_size, intermediate_size, num_heads * head_dim, num_kv_heads * head_dim, head_dim
    )
    return ModelSpec(
        architecture=architecture,
        dtype=_read_dtype(config),
        vocab_size=config.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=config.number("rms_norm_eps"),
        rope=_read_rope(config),
        context_length=config.count("max_position_embeddings"),
        windows=(None,) * num_layers,
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        eos_token_ids=config.token_ids("eos_token_id"),
        names=_NAMES,
        layer_tensors=tuple(
            tensor
            for tensor in tensors
            if tensor.parameter not in _OPTIONAL or tensor.parameter in optional
        ),
    )


def _check_plain(config: Config, architecture: str) -> None:
    if config.has("quantization_config"):
        method = config.section("quantization_config").text("quant_method", "unknown")
        raise UnsupportedModel(
            f"The checkpoint is quantized ('{method}'); store it as float32, bfloat16 or float16."
        )
    activation = config.text("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModel(f"{architecture} with hidden_act '{activation}' is not supported.")


def _read_dtype(config: Config) -> Dtype:
    text = config.text("dtype" if config.has("dtype") else "torch_dtype")
    try:
        return Dtype(text)
    except ValueError:
        supported = ", ".join(Dtype)
        raise UnsupportedModel(
            f"Weights of dtype '{text}' are not supported; use one of {supported}."
        ) from None


def _read_kv_heads(config: Config, num_heads: int) -> int:
    num_kv_heads = config.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.invalid(
            f"num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    return num_kv_heads


def _read_head_dim(config: Config, num_heads: int) -> int:
    hidden_size = config.count("hidden_size")
    if not config.has("head_dim") and hidden_size % num_heads:
        raise config.invalid(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
        )
    head_dim = config.count("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise config.invalid(f"head_dim {head_dim} is odd, rotary positions need pairs")
    return head_dim


def _read_rope(config: Config) -> Rope:
    # transformers 5 keeps everything in `rope_parameters`; before, the base frequency lay outside.
    if config.has("rope_parameters"):
        section = config.section("rope_parameters")
        theta = section.number("rope_theta")
    else:
        section = config.section("rope_scaling")
        theta = config.number("rope_theta", _DEFAULT_THETA)
    return Rope(theta=theta, scaling=_read_scaling(section))


def _read_scaling(section: Config) -> LinearScaling | Llama3Scaling | None:
    kind = section.text("rope_type", section.text("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=section.number("factor"))
    if kind == "llama3":
        return Llama3Scaling(
            factor=section.number("factor"),
            low_freq_factor=section.number("low_freq_factor"),
            high_freq_factor=section.number("high_freq_factor"),
            original_context=section.count("original_max_position_embeddings"),
        )
    raise UnsupportedModel(
        f"RoPE scaling '{kind}' is not supported; supported are default, linear, llama3."
    )


def _layer_tensors(
    hidden: int, intermediate: int, query: int, key_value: int, head_dim: int
) -> tuple[LayerTensor, ...]:
    """Every tensor a layer with all optional parameters would have."""
    shapes: tuple[tuple[Parameter, str, tuple[int, ...]], ...] = (
        (Parameter.ATTENTION_NORM, "input_layernorm.weight", (hidden,)),
        (Parameter.QUERY, "self_attn.q_proj.weight", (query, hidden)),
        (Parameter.QUERY_BIAS, "self_attn.q_proj.bias", (query,)),
        (Parameter.QUERY_NORM, "self_attn.q_norm.weight", (head_dim,)),
        (Parameter.KEY, "self_attn.k_proj.weight", (key_value, hidden)),
        (Parameter.KEY_BIAS, "self_attn.k_proj.bias", (key_value,)),
        (Parameter.KEY_NORM, "self_attn.k_norm.weight", (head_dim,)),
        (Parameter.VALUE, "self_attn.v_proj.weight", (key_value, hidden)),
        (Parameter.VALUE_BIAS, "self_attn.v_proj.bias", (key_value,)),
        (Parameter.OUTPUT, "self_attn.o_proj.weight", (hidden, query)),
        (Parameter.OUTPUT_BIAS, "self_attn.o_proj.bias", (hidden,)),
        (Parameter.MLP_NORM, "post_attention_layernorm.weight", (hidden,)),
        (Parameter.GATE, "mlp.gate_proj.weight", (intermediate, hidden)),
        (Parameter.GATE_BIAS, "mlp.gate_proj.bias", (intermediate,)),
        (Parameter.UP, "mlp.up_proj.weight", (intermediate, hidden)),
        (Parameter.UP_BIAS, "mlp.up_proj.bias", (intermediate,)),
        (Parameter.DOWN, "mlp.down_proj.weight", (hidden, intermediate)),
        (Parameter.DOWN_BIAS, "mlp.down_proj.bias", (hidden,)),
    )
    return tuple(
        LayerTensor(parameter=parameter, suffix=suffix, shape=shape)
        for parameter, suffix, shape in shapes
    )
