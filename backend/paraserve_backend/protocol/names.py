"""Names that both sides of an interface use: roles, engines, tensors of a forward pass, parameters.

Standard library only. Ranges of bytes and of layers are half-open everywhere: `[start, end)`.
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


# Tensor names of the role `generate` live in `paraserve_backend.protocol.tensors`; those of one
# forward pass, used by `stage`, `link` and the ensemble, are these.
FORWARD_BATCH = "batch"  # UINT8[-1]: an encoded `protocol.forward.ForwardBatch`
FORWARD_TOKEN_IDS = "token_ids"  # INT32[-1]: the new tokens of every row, concatenated
FORWARD_HIDDEN = "hidden"  # UINT8 [tokens, hidden_size * bytes per element]
FORWARD_RESULT = "result"  # UINT8[-1]: an encoded `protocol.forward.ForwardResult`

#: Request parameter that names the replica a request is meant for. A slot serves one replica after
#: the other, and refuses what was meant for another one.
REPLICA_PARAMETER = "paraserve_replica"
#: Request parameter, true, of a request without tensors: the replica's generate loop answers with
#: an empty final response as soon as it turns, or with UNAVAILABLE where its passes do not return.
PROBE_PARAMETER = "paraserve_probe"
#: Request parameter of a request without tensors: what the agent tells one of its models to do, as
#: JSON, and the secret that it wrote for that model's process (`protocol.run_dir`).
COMMAND_PARAMETER = "command"
SECRET_PARAMETER = "paraserve_secret"
#: All parameters that begin so are ours; a client that sends one is refused.
OWN_PREFIX = "paraserve_"

# ---- identifiers: nobody else puts one together or takes one apart ----


def replica_id(deployment: str, number: int) -> str:
    return f"{deployment}.{number}"


def deployment_of(replica: str) -> str:
    """Return the deployment whose replica this is; nothing if it is the id of none."""
    return replica.rpartition(".")[0]


def named_deployment(name: str) -> str:
    """Return the deployment a user means, who names it or one of its replicas.

    The name of a deployment has no dots.
    """
    return name.partition(".")[0]


def fetch_id(replica: str, stage: int) -> str:
    """Return the id of what one stage of a replica fetches."""
    return f"{replica}.{stage}"


def replica_of(fetch: str) -> str:
    """Return the replica whose fetch this is; nothing if the fetch is no replica's."""
    return fetch.rpartition(".")[0]


def slot_model(number: int, kind: SlotKind) -> str:
    """Return the name of a slot's Triton model; the number is never used again on its node."""
    return f"slot-{number}.{kind}"


@dataclass(frozen=True, slots=True)
class ReplicaModels:
    """Names of a replica's Triton models.

    They begin with its id, so that no two replicas have a model in common.
    """

    replica: str

    @property
    def generate(self) -> str:
        """The model on the head that takes requests."""
        return self.replica

    @property
    def forward(self) -> str:
        """The ensemble on the head that is one forward pass."""
        return f"{self.replica}.forward"

    @property
    def link(self) -> str:
        return f"{self.replica}.link"

    def stage(self, number: int) -> str:
        return f"{self.replica}.stage{number}"

    def __contains__(self, model: str) -> bool:
        return model == self.replica or model.startswith(f"{self.replica}.")

    def short(self, model: str) -> str:
        """Return what a model is within its replica, such as "stage0"; others keep their names."""
        if model == self.generate:
            return Role.GENERATE
        return model.removeprefix(f"{self.replica}.")
