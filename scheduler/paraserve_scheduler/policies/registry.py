"""The table of policies by name, ours and the baselines; each with its kind of worker process."""

from __future__ import annotations

from dataclasses import dataclass

from paraserve_backend.errors import InvalidRequest
from paraserve_scheduler.planner.decisions import PolicyFunction
from paraserve_scheduler.policies import hydraserve, paraserve, serverless_vllm, serverlessllm


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    name: str
    decide: PolicyFunction
    #: Which of a node kind's measured start methods its workers have.
    worker: str


_POLICIES = (
    Policy(name="paraserve", decide=paraserve.decide, worker="paraserve"),
    Policy(name="serverless-vllm", decide=serverless_vllm.decide, worker="serverless-vllm"),
    Policy(name="serverlessllm", decide=serverlessllm.decide, worker="serverlessllm"),
    Policy(name="hydraserve", decide=hydraserve.decide, worker="hydraserve"),
    Policy(name="hydraserve-cache", decide=hydraserve.decide_with_cache, worker="hydraserve"),
    Policy(name="oracle", decide=paraserve.decide, worker="oracle"),
)
POLICIES = {policy.name: policy for policy in _POLICIES}


def find_policy(name: str) -> Policy:
    """Raises `InvalidRequest` for a name that is none."""
    if name not in POLICIES:
        known = ", ".join(sorted(POLICIES))
        raise InvalidRequest(f"There is no policy '{name}'; there are {known}.")
    return POLICIES[name]
