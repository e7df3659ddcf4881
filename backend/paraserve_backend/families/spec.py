"""What the engine must know about a model: sizes, position encoding and tensor layout.

Read from config.json by a family (see `table`). The engine is one implementation: what a family
adds or leaves out (biases, norms on queries and keys) shows as the presence of a layer parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from paraserve_backend.contract import Dtype, TensorNames


class Parameter(StrEnum):
    """The parameters a decoder layer can have, under one name for all families.

    Matrices are stored as `[outputs, inputs]`.
    """

    ATTENTION_NORM = "attention_norm"
    QUERY = "query"
    QUERY_BIAS = "query_bias"
    QUERY_NORM = "query_norm"
    KEY = "key"
    KEY_BIAS = "key_bias"
    KEY_NORM = "key_norm"
    VALUE = "value"
    VALUE_BIAS = "value_bias"
    OUTPUT = "output"
    OUTPUT_BIAS = "output_bias"
    MLP_NORM = "mlp_norm"
    GATE = "gate"
    GATE_BIAS = "gate_bias"
    UP = "up"
    UP_BIAS = "up_bias"
    DOWN = "down"
    DOWN_BIAS = "down_bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTensor:
    """Where one layer parameter lies: `TensorNames.layer_prefix`, layer number, dot, `suffix`."""

    parameter: Parameter
    suffix: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Positions are divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Low frequencies are divided by `factor`, high ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    #: Context the model was pre-trained with, in tokens.
    original_context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    theta: float
    scaling: LinearScaling | Llama3Scaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    architecture: str
    dtype: Dtype
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    #: Longest sequence the model was made for, in tokens.
    context_length: int
    #: Per layer, how many positions a token attends to, its own included; `None` for all.
    windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    #: Tokens that end a generation; may be empty.
    eos_token_ids: tuple[int, ...]
    names: TensorNames
    layer_tensors: tuple[LayerTensor, ...]
