"""Names and records that both sides exchange; standard library only.

Byte ranges are half-open everywhere: `[start, end)`. Layer ranges too.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What one Triton model of backend `paraserve` does (docs/architecture.md)."""

    GENERATE = "generate"
    STAGE = "stage"
    LINK = "link"
    #: Any of them in turn, or none: a process that waits to be bound.
    SLOT = "slot"


class SlotKind(StrEnum):
    """What a slot can be bound as; each has imported what its role needs."""

    FRONT = "front"
    STAGE = "stage"
    LINK = "link"


#: What a slot of each kind becomes.
SLOT_ROLE = {
    SlotKind.FRONT: Role.GENERATE,
    SlotKind.STAGE: Role.STAGE,
    SlotKind.LINK: Role.LINK,
}


class EngineName(StrEnum):
    """What computes in a full instance; the stages of a pipeline are always our own."""

    PARASERVE = "paraserve"
    VLLM = "vllm"
    TENSORRT_LLM = "tensorrt-llm"


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


# Tensor names of the role `generate` live in `paraserve_backend.protocol.tensors`; those of one
# forward pass, used by `stage`, `link` and the ensemble, are these.
FORWARD_BATCH = "batch"  # UINT8[-1]: an encoded `engine.batch.ForwardBatch`
FORWARD_TOKEN_IDS = "token_ids"  # INT32[-1]: the new tokens of every row, concatenated
FORWARD_HIDDEN = "hidden"  # UINT8 [tokens, hidden_size * bytes per element]
FORWARD_RESULT = "result"  # UINT8[-1]: an encoded `engine.batch.ForwardResult`

#: Request parameter that names the replica a request is meant for. A slot serves one replica after
#: the other, and refuses what was meant for another one.
REPLICA_PARAMETER = "paraserve_replica"
