"""Fields of config.json that several families spell alike."""

from __future__ import annotations

from paraserve_backend.architectures.config_json import Config
from paraserve_backend.architectures.spec import Activation
from paraserve_backend.errors import UnsupportedModel
from paraserve_backend.protocol.names import Dtype

_FULL, _SLIDING = "full_attention", "sliding_attention"
_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "relu": Activation.RELU,
    "gelu": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
}


def check_not_quantized(config: Config) -> None:
    if config.has("quantization_config"):
        method = config.section("quantization_config").text("quant_method", "unknown")
        raise UnsupportedModel(
            f"The checkpoint is quantized ('{method}'); store it as float32, bfloat16 or float16."
        )


def read_dtype(config: Config) -> Dtype:
    text = config.text("dtype" if config.has("dtype") else "torch_dtype")
    try:
        return Dtype(text)
    except ValueError:
        supported = ", ".join(Dtype)
        raise UnsupportedModel(
            f"Weights of dtype '{text}' are not supported; use one of {supported}."
        ) from None


def read_activation(config: Config, field: str, default: str) -> Activation:
    name = config.text(field, default)
    if name not in _ACTIVATIONS:
        supported = ", ".join(_ACTIVATIONS)
        raise UnsupportedModel(
            f"Activation {field} '{name}' is not supported; supported are {supported}."
        )
    return _ACTIVATIONS[name]


def read_kv_heads(config: Config, field: str, num_heads: int) -> int:
    """Key heads; as many as query heads where the field is missing."""
    num_kv_heads = config.count(field, num_heads)
    if num_heads % num_kv_heads:
        raise config.invalid(
            f"num_attention_heads {num_heads} is not a multiple of {field} {num_kv_heads}"
        )
    return num_kv_heads


def split_hidden(config: Config, num_heads: int) -> int:
    """The size of a head where the heads share out the hidden size."""
    hidden_size = config.count("hidden_size")
    if hidden_size % num_heads:
        raise config.invalid(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
        )
    return hidden_size // num_heads


def read_windows(
    config: Config, window: int, sliding_by_default: tuple[bool, ...]
) -> tuple[int | None, ...]:
    """One window per layer: as `layer_types` says, in old configs as the family does."""
    if not config.has("layer_types"):
        return tuple(window if sliding else None for sliding in sliding_by_default)
    kinds = config.texts("layer_types")
    if len(kinds) != len(sliding_by_default) or not set(kinds) <= {_FULL, _SLIDING}:
        raise config.invalid(f"'layer_types' must name {_FULL} or {_SLIDING} for each layer")
    return tuple(window if kind == _SLIDING else None for kind in kinds)
