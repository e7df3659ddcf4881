"""Builds the specification of a decoder from its parts, with defaults for what most families share.

Here are the shape of each layer module, the module names of Llama-like checkpoints and the reader
for such checkpoints. What differs in one family is in `architectures.families`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from paraserve_backend.architectures.config_json import (
    Config,
    read_activation,
    read_dtype,
    read_kv_heads,
)
from paraserve_backend.architectures.rope import context_length, read_rope
from paraserve_backend.architectures.spec import (
    Activation,
    LayerModule,
    LearnedPositions,
    ModelSpec,
    Module,
    Normalisation,
    Rope,
    TensorNames,
)


def decoder_spec(
    config: Config,
    architecture: str,
    sizes: LayerSizes,
    *,
    modules: Mapping[Module, str],
    biased: Collection[Module],
    names: TensorNames,
    positions: Rope | LearnedPositions,
    max_positions: int,
    normalisation: Normalisation,
    norm_eps: float,
    activation: Activation,
    tied: bool,
) -> ModelSpec:
    """Attention and MLP in turn, each token attending to all before it; no caps, no scales.

    `modules` are in the order of a forward pass; `max_positions` is the config's own limit.
    """
    num_layers = config.count("num_hidden_layers")
    scaling = positions.scaling if isinstance(positions, Rope) else None
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
        normalisation=normalisation,
        norm_eps=norm_eps,
        activation=activation,
        positions=positions,
        context_length=context_length(config, max_positions, scaling),
        windows=(None,) * num_layers,
        attention_scale=sizes.head_dim**-0.5,
        tie_word_embeddings=tied,
        eos_token_ids=config.token_ids("eos_token_id"),
        names=names,
        layer_modules=layer_modules(sizes, modules, biased),
    )


#: Layer modules of Llama; other families add to them or replace some.
MODULES: Mapping[Module, str] = {
    Module.ATTENTION_NORM: "input_layernorm",
    Module.QUERY: "self_attn.q_proj",
    Module.KEY: "self_attn.k_proj",
    Module.VALUE: "self_attn.v_proj",
    Module.OUTPUT: "self_attn.o_proj",
    Module.MLP_NORM: "post_attention_layernorm",
    Module.GATE: "mlp.gate_proj",
    Module.UP: "mlp.up_proj",
    Module.DOWN: "mlp.down_proj",
}
QKV = frozenset({Module.QUERY, Module.KEY, Module.VALUE})
ATTENTION = QKV | {Module.OUTPUT}
MLP = frozenset({Module.GATE, Module.UP, Module.DOWN})
_NAMES = TensorNames(
    layer_prefix="model.layers.",
    embedding=("model.embed_tokens.weight",),
    final=("model.norm.weight",),
    head="lm_head.weight",
)


def read_spec(
    config: Config,
    architecture: str,
    *,
    modules: Mapping[Module, str] = MODULES,
    biased: Collection[Module] = (),
    rope: Callable[[Config, int], Rope] = read_rope,
    activation: str = "hidden_act",
) -> ModelSpec:
    """The spec of a model laid out like Llama, with these layer modules.

    `biased` are the modules with a bias; `rope` reads the rotation for a size of head;
    `activation` is the field that names it.
    """
    sizes = _read_sizes(config)
    return decoder_spec(
        config,
        architecture,
        sizes,
        modules=modules,
        biased=biased,
        names=_NAMES,
        positions=rope(config, sizes.head_dim),
        max_positions=config.count("max_position_embeddings"),
        normalisation=Normalisation.RMS,
        norm_eps=config.number_or_zero("rms_norm_eps"),
        activation=read_activation(config, activation),
        tied=config.flag("tie_word_embeddings"),
    )


def _read_sizes(config: Config) -> LayerSizes:
    num_heads = config.count("num_attention_heads")
    hidden = config.count("hidden_size")
    if hidden < num_heads:
        raise config.invalid(f"num_attention_heads {num_heads} is more than hidden_size {hidden}")
    return LayerSizes(
        hidden=hidden,
        intermediate=config.count("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=read_kv_heads(config, "num_key_value_heads", num_heads),
        # As transformers has it, also where this leaves a rest.
        head_dim=config.count("head_dim", hidden // num_heads),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSizes:
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def shape(self, module: Module) -> tuple[int, ...]:
        """The weight's shape, `[outputs, inputs]` for a matrix."""
        query = self.num_heads * self.head_dim
        keys = self.num_kv_heads * self.head_dim
        match module:
            case Module.QUERY:
                return (query, self.hidden)
            case Module.KEY | Module.VALUE:
                return (keys, self.hidden)
            case Module.QKV:
                return (query + 2 * keys, self.hidden)
            case Module.OUTPUT:
                return (self.hidden, query)
            case Module.GATE | Module.UP:
                return (self.intermediate, self.hidden)
            case Module.GATE_UP:
                return (2 * self.intermediate, self.hidden)
            case Module.DOWN:
                return (self.hidden, self.intermediate)
            case Module.QUERY_NORM | Module.KEY_NORM:
                return (self.head_dim,)
        return (self.hidden,)


def layer_modules(
    sizes: LayerSizes, names: Mapping[Module, str], biased: Collection[Module] = ()
) -> tuple[LayerModule, ...]:
    """The modules that `names` lists, in its order, which is that of a forward pass."""
    return tuple(
        LayerModule(module=module, name=name, shape=sizes.shape(module), bias=module in biased)
        for module, name in names.items()
    )
