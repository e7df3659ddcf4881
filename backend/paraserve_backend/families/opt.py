"""OPT: learned positions, layer norms and biases, a plain MLP."""

from __future__ import annotations

from paraserve_backend.contract import TensorNames
from paraserve_backend.errors import UnsupportedModel
from paraserve_backend.families.config import Config
from paraserve_backend.families.fields import (
    check_not_quantized,
    read_activation,
    read_dtype,
    split_hidden,
)
from paraserve_backend.families.layout import LayerSizes, layer_modules
from paraserve_backend.families.spec import (
    LearnedPositions,
    ModelSpec,
    Module,
    Normalisation,
    Residual,
)

_MODULES = {
    Module.ATTENTION_NORM: "self_attn_layer_norm",
    Module.QUERY: "self_attn.q_proj",
    Module.KEY: "self_attn.k_proj",
    Module.VALUE: "self_attn.v_proj",
    Module.OUTPUT: "self_attn.out_proj",
    Module.MLP_NORM: "final_layer_norm",
    Module.UP: "fc1",
    Module.DOWN: "fc2",
}
_NORMS = frozenset({Module.ATTENTION_NORM, Module.MLP_NORM})
#: Rows of the position table before position 0.
_OFFSET = 2
#: PyTorch's own; the config has no field for it.
_NORM_EPS = 1e-5


def read_opt(config: Config, architecture: str) -> ModelSpec:
    check_not_quantized(config)
    _check_plain(config, architecture)
    sizes = _read_sizes(config)
    norm_before = config.flag("do_layer_norm_before", True)
    biased = frozenset(_MODULES) if config.flag("enable_bias", True) else _NORMS
    num_layers = config.count("num_hidden_layers")
    return ModelSpec(
        architecture=architecture,
        dtype=read_dtype(config),
        vocab_size=config.count("vocab_size"),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_layers=num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        normalisation=Normalisation.LAYER,
        norm_eps=_NORM_EPS,
        activation=read_activation(config, "activation_function", "relu"),
        residual=Residual.SEQUENTIAL if norm_before else Residual.NORM_AFTER,
        positions=LearnedPositions(offset=_OFFSET),
        context_length=config.count("max_position_embeddings"),
        windows=(None,) * num_layers,
        attention_scale=sizes.head_dim**-0.5,
        tie_word_embeddings=config.flag("tie_word_embeddings", True),
        eos_token_ids=config.token_ids("eos_token_id"),
        names=_names(final_norm=norm_before and not config.flag("_remove_final_layer_norm", False)),
        layer_modules=layer_modules(sizes, _MODULES, biased),
    )


def _check_plain(config: Config, architecture: str) -> None:
    hidden_size = config.count("hidden_size")
    projected = config.count("word_embed_proj_dim", hidden_size)
    if projected != hidden_size:
        raise UnsupportedModel(
            f"{architecture} with word_embed_proj_dim {projected} other than hidden_size "
            f"{hidden_size} is not supported."
        )
    if not config.flag("layer_norm_elementwise_affine", True):
        raise UnsupportedModel(
            f"{architecture} with layer_norm_elementwise_affine false is not supported."
        )


def _read_sizes(config: Config) -> LayerSizes:
    num_heads = config.count("num_attention_heads")
    return LayerSizes(
        hidden=config.count("hidden_size"),
        intermediate=config.count("ffn_dim"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=split_hidden(config, num_heads),
    )


def _names(*, final_norm: bool) -> TensorNames:
    prefix = "model.decoder."
    norm = (f"{prefix}final_layer_norm.weight", f"{prefix}final_layer_norm.bias")
    return TensorNames(
        layer_prefix=f"{prefix}layers.",
        embedding=(f"{prefix}embed_tokens.weight", f"{prefix}embed_positions.weight"),
        final=norm if final_norm else (),
        head="lm_head.weight",
    )
