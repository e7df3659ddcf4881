"""Names that both sides of an interface use: roles, engines, tensors of a forward pass, parameters.

Standard library only. Ranges of bytes and of layers are half-open everywhere: `[start, end)`.
"""

from __future__ import annotations

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


# Tensor names of the role `generate` live in `paraserve_backend.protocol.tensors`; those of one
# forward pass, used by `stage`, `link` and the ensemble, are these.
FORWARD_BATCH = "batch"  # UINT8[-1]: an encoded `protocol.forward.ForwardBatch`
FORWARD_TOKEN_IDS = "token_ids"  # INT32[-1]: the new tokens of every row, concatenated
FORWARD_HIDDEN = "hidden"  # UINT8 [tokens, hidden_size * bytes per element]
FORWARD_RESULT = "result"  # UINT8[-1]: an encoded `protocol.forward.ForwardResult`

#: Request parameter that names the replica a request is meant for. A slot serves one replica after
#: the other, and refuses what was meant for another one.
REPLICA_PARAMETER = "paraserve_replica"
