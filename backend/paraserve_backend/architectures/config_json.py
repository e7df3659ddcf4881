"""Typed reads of a Hugging Face config.json; every error names the field.

Fields that many families share have a reader of their own here: dtype, activation, key heads,
attention windows, and the refusal of quantized checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

from paraserve_backend.architectures.spec import Activation, Dtype
from paraserve_backend.errors import InvalidCheckpoint, UnsupportedModel

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


#: What float32 can hold: beyond, a number would be zero or infinite in every computation.
_LEAST, _MOST = 1.2e-38, 3.4e38
_MOST_COUNT = 2**53


class Config:
    """A JSON object whose fields are read by type; `null` counts as absent."""

    def __init__(self, fields: Mapping[str, object], name: str = "config.json") -> None:
        self._fields = fields
        self._name = name

    @property
    def is_empty(self) -> bool:
        return not self._fields

    def has(self, field: str) -> bool:
        return self._fields.get(field) is not None

    def count(self, field: str, default: int | None = None) -> int:
        """A whole number above zero."""
        value = self._read(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MOST_COUNT:
            raise self._wrong(field, "a whole number above zero")
        return value

    def count_or_null(self, field: str, default: int | None) -> int | None:
        """A whole number above zero; `null` switches off what an absent field leaves at default."""
        return self.count(field, default) if self._is_given(field, default) else None

    def whole(self, field: str, default: int) -> int:
        """A whole number, zero included."""
        value = self._read(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong(field, "a whole number")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self._read(field, default)
        if not _is_positive(value):
            raise self._wrong(field, "a number above zero")
        return float(value)

    def number_or_null(self, field: str, default: float | None) -> float | None:
        """A number above zero; `null` switches off what an absent field leaves at default."""
        return self.number(field, default) if self._is_given(field, default) else None

    def numbers(self, field: str) -> tuple[float, ...]:
        """A list of finite numbers above zero."""
        value = self._read(field, None)
        if not isinstance(value, list) or not all(map(_is_positive, value)):
            raise self._wrong(field, "a list of numbers above zero")
        return tuple(map(float, value))

    def flag(self, field: str, default: bool | None = None) -> bool:
        value = self._read(field, default)
        if not isinstance(value, bool):
            raise self._wrong(field, "true or false")
        return value

    def text(self, field: str, default: str | None = None) -> str:
        value = self._read(field, default)
        if not isinstance(value, str):
            raise self._wrong(field, "a string")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        value = self._read(field, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(field, "a list of strings")
        return tuple(value)

    def token_ids(self, field: str) -> tuple[int, ...]:
        """One token id or a list of them; empty when absent."""
        value = self._fields.get(field)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and item >= 0 for item in ids):
            raise self._wrong(field, "a token id or a list of them")
        return tuple(ids)

    def section(self, field: str) -> Config:
        """A nested object; empty when absent."""
        value = self._fields.get(field)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(field, "an object")
        return Config(value or {}, f"{field} in {self._name}")

    def invalid(self, problem: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"{self._name}: {problem}.")

    def _is_given(self, field: str, default: object) -> bool:
        return self._fields.get(field, default) is not None

    def _read(self, field: str, default: object) -> object:
        value = self._fields.get(field)
        value = default if value is None else value
        if value is None:
            raise self.invalid(f"the field '{field}' is missing")
        return value

    def _wrong(self, field: str, expected: str) -> InvalidCheckpoint:
        return self.invalid(f"'{field}' is {self._fields.get(field)!r}, expected {expected}")


def _is_positive(value: object) -> TypeGuard[int | float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return _LEAST <= value <= _MOST
