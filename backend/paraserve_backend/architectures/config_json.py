"""Typed reads of a Hugging Face config.json; every error names the field.

Fields that many families share have a reader of their own here: dtype, activation, key heads,
attention windows, and the refusal of quantized checkpoints. The table of the largest counts is
here too: whatever is built from a config.json is built from counts below these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

from paraserve_backend.architectures.spec import Activation, Dtype
from paraserve_backend.errors import InvalidCheckpoint, UnsupportedModel

_FULL, _SLIDING = "full_attention", "sliding_attention"
#: What earlier releases of transformers called it.
_OLD_KINDS = {"attention": _FULL}
_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "relu": Activation.RELU,
    "gelu": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
}


#: What PyTorch calls these types, too.
_OTHER_DTYPES = {"float": Dtype.FLOAT32, "half": Dtype.FLOAT16}
#: Under this name `Config.defaults` has the type in which the weights are stored.
STORED_DTYPE = "torch_dtype"


def check_not_quantized(config: Config) -> None:
    if config.has("quantization_config"):
        method = config.section("quantization_config").text("quant_method", "unknown")
        raise UnsupportedModel(
            f"The checkpoint is quantized ('{method}'); store it as float32, bfloat16 or float16."
        )


def read_dtype(config: Config) -> Dtype:
    """The type to compute in: the config's, or the one in which the weights are stored."""
    field = "dtype" if config.has("dtype") else STORED_DTYPE
    supported = ", ".join(Dtype)
    if not config.has(field):
        raise config.invalid(f"the field 'dtype' is missing: add it, with one of {supported}")
    text = config.text(field)
    try:
        return _OTHER_DTYPES[text] if text in _OTHER_DTYPES else Dtype(text)
    except ValueError:
        raise UnsupportedModel(
            f"Weights of dtype '{text}' are not supported; use one of {supported}."
        ) from None


def read_activation(config: Config, field: str) -> Activation:
    name = config.text(field)
    if name not in _ACTIVATIONS:
        supported = ", ".join(_ACTIVATIONS)
        raise UnsupportedModel(
            f"Activation {field} '{name}' is not supported; supported are {supported}."
        )
    return _ACTIVATIONS[name]


def read_kv_heads(config: Config, field: str, num_heads: int) -> int:
    """Key heads; as many as query heads where the field is null, or absent without a default."""
    num_kv_heads = config.count_or_null(field) or num_heads
    if num_heads % num_kv_heads:
        raise config.invalid(
            f"num_attention_heads {num_heads} is not a multiple of {field} {num_kv_heads}"
        )
    return num_kv_heads


def split_hidden(config: Config, hidden_size: int, num_heads: int) -> int:
    """The size of a head where the heads share out the hidden size."""
    if hidden_size % num_heads:
        raise config.invalid(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
        )
    return hidden_size // num_heads


def read_windows(
    config: Config, window: int | None, sliding_by_default: tuple[bool, ...]
) -> tuple[int | None, ...]:
    """One window per layer: as `layer_types` says, in old configs as the family does."""
    if not config.has("layer_types"):
        return tuple(window if sliding else None for sliding in sliding_by_default)
    kinds = [_OLD_KINDS.get(kind, kind) for kind in config.texts("layer_types")]
    if len(kinds) != len(sliding_by_default) or not set(kinds) <= {_FULL, _SLIDING}:
        raise config.invalid(f"'layer_types' must name {_FULL} or {_SLIDING} for each layer")
    return tuple(window if kind == _SLIDING else None for kind in kinds)


#: What float32 can hold: beyond, a number would be zero or infinite in every computation.
_LEAST, _MOST = 1.2e-38, 3.4e38
#: The largest counts that we believe: each some ten times what the largest published models have.
_MOST_COUNTS: Mapping[str, int] = {
    "num_hidden_layers": 1000,
    "vocab_size": 10_000_000,
    "hidden_size": 1_000_000,
    "n_embed": 1_000_000,
    "word_embed_proj_dim": 1_000_000,
    "intermediate_size": 10_000_000,
    "ffn_dim": 10_000_000,
    "ffn_hidden_size": 10_000_000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "num_kv_heads": 10_000,
    "head_dim": 100_000,
    "max_position_embeddings": 1_000_000_000,
    "original_max_position_embeddings": 1_000_000_000,
}
#: Characters of a wrong value that a sentence repeats.
_MOST_SHOWN = 100
#: What every JSON reader keeps exactly: the limit of the counts from which nothing is built.
_MOST_COUNT = 2**53 - 1


class Config:
    """A JSON object whose fields are read by type; `null` counts as absent unless a method says so.

    `defaults` is what transformers assumes where the object has no such field.
    """

    def __init__(
        self,
        fields: Mapping[str, object],
        name: str = "config.json",
        *,
        defaults: Mapping[str, object] | None = None,
    ) -> None:
        self._fields = fields
        self._name = name
        self._defaults = defaults or {}

    @property
    def is_empty(self) -> bool:
        return not self._fields

    def has(self, field: str) -> bool:
        """Tell whether the field has a value, stated or by default."""
        return self._value(field) is not None

    def count(self, field: str, default: int | None = None) -> int:
        """A whole number above zero and at most what the table of counts allows."""
        value = self._read(field, default)
        if type(value) is not int or value < 1:
            raise self._wrong(field, "a whole number above zero")
        if value > (most := _MOST_COUNTS.get(field, _MOST_COUNT)):
            raise self._wrong(field, f"a whole number up to {most}")
        return value

    def count_or_null(self, field: str) -> int | None:
        """As `count`; `null` switches off what an absent field leaves at its default."""
        return self.count(field) if self._or_null(field) is not None else None

    def whole(self, field: str) -> int:
        """A whole number, zero included."""
        value = self._read(field)
        if type(value) is not int or value < 0:
            raise self._wrong(field, "a whole number")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self._read(field, default)
        if not _is_positive(value):
            raise self._wrong(field, "a number above zero")
        return float(value)

    def number_or_zero(self, field: str) -> float:
        """A finite number, zero included."""
        value = self._read(field)
        return 0.0 if type(value) in (int, float) and value == 0 else self.number(field)

    def number_or_null(self, field: str) -> float | None:
        """As `number`; `null` switches off what an absent field leaves at its default."""
        return self.number(field) if self._or_null(field) is not None else None

    def numbers(self, field: str) -> tuple[float, ...]:
        """A list of finite numbers above zero."""
        value = self._read(field)
        if not isinstance(value, list) or not all(map(_is_positive, value)):
            raise self._wrong(field, "a list of numbers above zero")
        return tuple(map(float, value))

    def flag(self, field: str, default: bool | None = None) -> bool:
        value = self._read(field, default)
        if not isinstance(value, bool):
            raise self._wrong(field, "true or false")
        return value

    def flag_or_null(self, field: str) -> bool:
        """As `flag`; `null` is false, whatever an absent field means."""
        return self.flag(field) if self._or_null(field) is not None else False

    def text(self, field: str, default: str | None = None) -> str:
        value = self._read(field, default)
        if not isinstance(value, str):
            raise self._wrong(field, "a string")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        value = self._read(field)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(field, "a list of strings")
        return tuple(value)

    def token_ids(self, field: str) -> tuple[int, ...]:
        """One token id or a list of them, `null` for none; a negative one stands for none, too."""
        value = self._or_null(field)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        numbers = [item for item in ids if isinstance(item, int) and not isinstance(item, bool)]
        if len(numbers) < len(ids):
            raise self._wrong(field, "a token id or a list of them")
        return tuple(number for number in numbers if number >= 0)

    def section(self, field: str) -> Config:
        """A nested object; empty when absent."""
        value = self._fields.get(field)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(field, "an object")
        return Config(value or {}, f"{field} in {self._name}")

    def invalid(self, problem: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"{self._name}: {problem}.")

    def _value(self, field: str) -> object:
        value = self._fields.get(field)
        return self._defaults.get(field) if value is None else value

    def _or_null(self, field: str) -> object:
        return self._fields[field] if field in self._fields else self._defaults.get(field)

    def _read(self, field: str, default: object = None) -> object:
        value = self._value(field)
        value = default if value is None else value
        if value is None:
            raise self.invalid(f"the field '{field}' is missing")
        return value

    def _wrong(self, field: str, expected: str) -> InvalidCheckpoint:
        shown = repr(self._fields.get(field))
        if len(shown) > _MOST_SHOWN:
            shown = f"{shown[:_MOST_SHOWN]}..."
        return self.invalid(f"'{field}' is {shown}, expected {expected}")


def _is_positive(value: object) -> TypeGuard[int | float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return _LEAST <= value <= _MOST
