"""Which request settings each external engine supports, and the check of a request against them.

Pure, so that a gateway can refuse a request before it wakes a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.request import GenerateRequest
from paraserve_backend.protocol.sampling import Steering


class Setting(StrEnum):
    """Settings of a request that not every engine has, by the names clients use."""

    BAD_WORDS = "bad_words"
    MIN_TOKENS = "min_tokens"
    MIN_P = "min_p"
    REPETITION_PENALTY = "repetition_penalty"
    PRESENCE_PENALTY = "presence_penalty"
    FREQUENCY_PENALTY = "frequency_penalty"


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What an engine can do besides temperature, top-k, top-p, end tokens and log-probabilities."""

    #: As a deployment's `engine` and the parameter of config.pbtxt spell it.
    name: str
    settings: frozenset[Setting]
    #: Those of them that mean the same when the first tokens of the answer come with the prompt.
    carried: frozenset[Setting]
    #: Whether it runs in processes of its own.
    has_processes: bool = False
    #: Variables to set before anything of the engine is imported.
    environment: Mapping[str, str] = field(default_factory=dict)


#: Bad words, a shortest answer, min_p and penalties: some releases take them and do nothing, or
#: count the prompt as part of the answer.
TENSORRT_LLM = Abilities(
    name="tensorrt-llm",
    settings=frozenset(),
    carried=frozenset(),
    has_processes=True,
    environment={"HF_HUB_OFFLINE": "1"},
)
VLLM = Abilities(
    name="vllm",
    # Bad words need its own tokenizer, which is not loaded.
    settings=frozenset(Setting) - {Setting.BAD_WORDS},
    # Of presence and frequency it counts the tokens that it has generated itself.
    carried=frozenset({Setting.MIN_TOKENS, Setting.MIN_P, Setting.REPETITION_PENALTY}),
    has_processes=True,
    environment={
        # Triton's stub has threads, which a forked process would not have.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    },
)
#: By the name a deployment gives its engine. "paraserve", our own, is not among them.
ABILITIES: Mapping[str, Abilities] = {each.name: each for each in (TENSORRT_LLM, VLLM)}


def check(request: GenerateRequest, abilities: Abilities, *, is_resumed: bool = False) -> None:
    """Refuse what the engine would ignore or do in its own way.

    Raises:
        InvalidRequest: names the setting.
    """
    used = _settings(request)
    for setting in sorted(used - abilities.settings):
        raise InvalidRequest(
            f"'{setting}' is not something the engine {abilities.name} can do; leave it out."
        )
    for setting in sorted(used - abilities.carried) if is_resumed else ():
        raise InvalidRequest(
            f"'{setting}' cannot be carried over to the engine {abilities.name}: to it the tokens "
            "so far are part of the prompt. Send the request again."
        )


def can_be_carried(request: GenerateRequest, abilities: Abilities) -> bool:
    """Tell whether the engine can go on with the request where another one has begun it."""
    return _settings(request) <= abilities.carried


def _settings(request: GenerateRequest) -> frozenset[Setting]:
    """Return which of the settings that an engine may lack the request uses."""
    steering = request.sampling.steering or Steering()
    used = {
        Setting.BAD_WORDS: bool(request.bad_words),
        Setting.MIN_TOKENS: request.min_tokens > 0,
        Setting.MIN_P: steering.min_p > 0.0,
        Setting.REPETITION_PENALTY: steering.repetition_penalty != 1.0,
        Setting.PRESENCE_PENALTY: steering.presence_penalty != 0.0,
        Setting.FREQUENCY_PENALTY: steering.frequency_penalty != 0.0,
    }
    return frozenset(setting for setting, is_used in used.items() if is_used)
