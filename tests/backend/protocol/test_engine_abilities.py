from __future__ import annotations

from typing import Any

import pytest

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.engine_abilities import (
    ABILITIES,
    Setting,
    can_be_carried,
    check,
)
from paraserve_backend.protocol.request import GenerateRequest
from paraserve_backend.protocol.sampling import Sampling, Steering

#: A request that uses one setting.
USES: dict[Setting, dict[str, Any]] = {
    Setting.BAD_WORDS: {"bad_words": ("no",)},
    Setting.MIN_TOKENS: {"min_tokens": 1},
    Setting.MIN_P: {"sampling": Sampling(steering=Steering(min_p=0.1))},
    Setting.REPETITION_PENALTY: {"sampling": Sampling(steering=Steering(repetition_penalty=0.9))},
    Setting.PRESENCE_PENALTY: {"sampling": Sampling(steering=Steering(presence_penalty=-1.0))},
    Setting.FREQUENCY_PENALTY: {"sampling": Sampling(steering=Steering(frequency_penalty=1.0))},
}
PLAIN: dict[str, Any] = {
    "text": "hello",
    "input_ids": None,
    "sampling": Sampling(temperature=0.7, top_k=5, top_p=0.9, steering=Steering(num_logprobs=3)),
    "max_tokens": 9,
}


@pytest.mark.parametrize("engine", ABILITIES)
@pytest.mark.parametrize("setting", Setting)
def test_a_setting_is_refused_unless_the_engine_has_it(engine: str, setting: Setting) -> None:
    abilities = ABILITIES[engine]
    request = GenerateRequest(**(PLAIN | USES[setting]))
    assert can_be_carried(request, abilities) == (setting in abilities.carried)
    if setting in abilities.settings:
        check(request, abilities)
    else:
        with pytest.raises(InvalidRequest, match=f"'{setting}' is not .* engine {engine}"):
            check(request, abilities)
    if setting not in abilities.carried:
        with pytest.raises(InvalidRequest, match=f"'{setting}'"):
            check(request, abilities, is_resumed=True)


@pytest.mark.parametrize("engine", ABILITIES)
def test_every_engine_can_do_what_most_requests_ask_for(engine: str) -> None:
    request = GenerateRequest(**PLAIN)
    check(request, ABILITIES[engine], is_resumed=True)
    assert can_be_carried(request, ABILITIES[engine])
    assert ABILITIES[engine].carried <= ABILITIES[engine].settings
