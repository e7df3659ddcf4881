"""What the engine must know about a model: sizes, position encoding, tensor layout.

Read from config.json by a family (see `registry`). The engine is one implementation: all that tells
one family from another is a value here. What a layer adds or leaves out (biases, norms on queries
and keys, a gate) shows as the presence of a module.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto


class Module(StrEnum):
    """The modules a decoder layer can have, under one name for all families."""

    ATTENTION_NORM = "attention_norm"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    #: Query, key and value in one matrix, in the order of `ModelSpec.qkv_order`.
    QKV = "qkv"
    QUERY_NORM = "query_norm"
    KEY_NORM = "key_norm"
    OUTPUT = "output"
    #: On what attention gives, before it is added to the hidden states.
    ATTENTION_POST_NORM = "attention_post_norm"
    MLP_NORM = "mlp_norm"
    #: An MLP without gate maps through its activation between `UP` and `DOWN`.
    GATE = "gate"
    UP = "up"
    #: Gate and up in one matrix, the gate's rows first.
    GATE_UP = "gate_up"
    DOWN = "down"
    #: On what the MLP gives, before it is added to the hidden states.
    MLP_POST_NORM = "mlp_post_norm"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerModule:
    """One module of each layer and where its tensors lie.

    They are `TensorNames.layer_prefix`, layer number, dot, `name` and `.weight`, and where the
    module has a `bias` of `shape[0]` numbers, `.bias`.
    """

    module: Module
    name: str
    #: Of the weight; a matrix is stored as `[outputs, inputs]`.
    shape: tuple[int, ...]
    bias: bool


class QkvOrder(Enum):
    """How the rows of a `Module.QKV` are ordered."""

    #: All queries, then all keys, then all values.
    BLOCKS = auto()
    #: For each key head its queries, its key and its value.
    GROUPS = auto()


class Residual(Enum):
    """How attention and MLP follow each other, and where the norms are."""

    #: Attention, then the MLP, each on the norm of what it is added to.
    SEQUENTIAL = auto()
    #: Both on norms of the layer's input (the same one without `Module.MLP_NORM`), added together.
    PARALLEL = auto()
    #: Attention, then the MLP, each on the sum before; the norm is on the new sum.
    NORM_AFTER = auto()


class Normalisation(Enum):
    """What a norm computes; all over the last dimension."""

    #: To unit mean square in float32, rounded, times the weight.
    RMS = auto()
    #: To unit mean square, times one plus the weight, all in float32.
    RMS_PLUS_ONE = auto()
    #: To zero mean and unit variance, times the weight, plus the bias.
    LAYER = auto()


class Activation(Enum):
    SILU = auto()
    RELU = auto()
    GELU = auto()
    #: GELU approximated with a hyperbolic tangent.
    GELU_TANH = auto()


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
class YarnScaling:
    """As `Llama3Scaling`, blended over the dimensions between two numbers of turns.

    The numbers are those a dimension makes in `original_context` tokens: from `beta_fast` on it is
    kept, up to `beta_slow` divided. `truncate` widens the blend to whole dimensions.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    original_context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRopeScaling:
    """Each pair of dimensions has its own factor: those for at most `original_context` tokens.

    The factors for longer sequences are not here: see `rope.context_length`.
    """

    factors: tuple[float, ...]
    original_context: int


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Positions turn the first `dim` dimensions of each query and key head."""

    theta: float
    dim: int
    scaling: RopeScaling | None = None
    #: What cosines and sines are multiplied by.
    magnitude: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedPositions:
    """Positions are rows of a second embedding, `names.embedding[1]`, added to the first.

    Position 0 is row `offset`; the table has `offset + ModelSpec.context_length` rows.
    """

    offset: int


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
    normalisation: Normalisation
    norm_eps: float
    activation: Activation
    residual: Residual = Residual.SEQUENTIAL
    positions: Rope | LearnedPositions
    #: Longest sequence that we run as the model was made to, in tokens.
    context_length: int
    #: Per layer, how many positions a token attends to, its own included; `None` for all.
    windows: tuple[int | None, ...]
    #: What the product of query and key is multiplied by.
    attention_scale: float
    #: Where attention scores, and logits, level off; `None` for nowhere.
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    #: What token embeddings are multiplied by, rounded to `dtype`.
    embedding_scale: float | None = None
    tie_word_embeddings: bool
    #: Tokens that end a generation; may be empty.
    eos_token_ids: tuple[int, ...]
    #: `embedding` is of tokens, then of positions where they are learned; `final` is the norm's
    #: weight, then its bias where it has one, or nothing for a model that ends without a norm.
    names: TensorNames
    layer_modules: tuple[LayerModule, ...]
    qkv_order: QkvOrder = QkvOrder.BLOCKS


class Dtype(StrEnum):
    """Weight and activation types, spelt as `torch_dtype` in a Hugging Face config.json."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


#: Bytes of one element.
DTYPE_BYTES = {Dtype.FLOAT32: 4, Dtype.BFLOAT16: 2, Dtype.FLOAT16: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRange:
    """Decoder layers `[start, end)` of a model with `total` layers: one stage.

    The stage that starts at 0 also holds the embedding; the one that ends at `total` also holds
    the final norm and the head.
    """

    start: int
    end: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= self.total:
            raise ValueError(f"no layers in [{self.start}, {self.end}) of {self.total}")

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.end == self.total

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Where a model family keeps its tensors inside a checkpoint."""

    #: Prefix of a layer's tensors up to its number, e.g. `model.layers.`.
    layer_prefix: str
    #: Tensors the first stage needs, e.g. `model.embed_tokens.weight`.
    embedding: tuple[str, ...]
    #: Tensors the last stage needs besides the head, e.g. `model.norm.weight`.
    final: tuple[str, ...]
    #: The output head; a model with tied embeddings uses `embedding[0]` instead.
    head: str
