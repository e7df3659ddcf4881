"""Running requests go on in another engine: two Tritons, two processes, two implementations.

The one is ours, the other is `transformers`. The test follows the requests as a gateway does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tritonclient.grpc as triton
import zmq

from integration.support.single_models import (
    FRESH,
    MAX_TOKENS,
    Asked,
    add_model,
    hand_over,
    kill,
    load,
    unload,
)
from integration.support.tiny_cluster import prompts
from integration.support.transformers_engine import model_py
from integration.support.triton_server import TritonServer
from paraserve_backend.protocol.resume import Resume
from paraserve_backend.protocol.sampling import ChosenToken
from tests.support.models import TinyModel, write_model, write_words
from tests.support.ports import free_ports


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    #: Model "ours", with our engine.
    ours: TritonServer
    #: Model "theirs", with the other one.
    theirs: TritonServer
    model: TinyModel


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    checkpoint, key_file = tmp_path / "checkpoint", tmp_path / "curve.key"
    model = write_model(checkpoint, "llama", seed=4)
    write_words(checkpoint)
    key_file.write_bytes(b"\n".join(zmq.curve_keypair()))
    (port,) = free_ports(1)
    inbox = {"hand_over": f"tcp://127.0.0.1:{port}", "key_file": str(key_file)}
    with TritonServer(tmp_path / "ours") as ours, TritonServer(tmp_path / "theirs") as theirs:
        add_model(ours, "ours", "paraserve", checkpoint, inbox)
        load(ours, "ours")
        theirs.add_backend("second", model_py(tmp_path / "package"))
        add_model(theirs, "theirs", "second", checkpoint, {"engine": "transformers"})
        load(theirs, "theirs")
        yield Pair(ours=ours, theirs=theirs, model=model)
        unload(ours)
        unload(theirs)


def test_a_running_request_moves_to_another_engine_and_back(pair: Pair) -> None:
    prompt = prompts(3)[2]
    expected = pair.model.greedy(prompt, MAX_TOKENS)
    asked = Asked(pair.ours, "ours", prompt, FRESH)
    got = asked.take(5)
    hand_over(pair.ours, "ours", "theirs")
    more, last = asked.rest()
    got += more
    assert last.moved is not None
    target, resume = last.moved
    assert (target, [token.token_id for token in resume.tokens]) == ("theirs", got)
    assert len(got) < MAX_TOKENS

    asked = Asked(pair.theirs, "theirs", prompt, resume)
    got += asked.take(5)
    hand_over(pair.theirs, "theirs", "ours")
    more, last = asked.rest()
    got += more
    assert last.moved is not None
    hand_over(pair.ours, "ours")  # to nobody any more
    rest, last = Asked(pair.ours, "ours", prompt, last.moved[1]).rest()
    assert last.moved is None
    assert got + rest == expected


def test_several_requests_move_at_once_and_none_loses_a_token(pair: Pair) -> None:
    asked = {tuple(prompt): Asked(pair.ours, "ours", prompt, FRESH) for prompt in prompts(4)}
    got = {prompt: each.take(2) for prompt, each in asked.items()}
    hand_over(pair.ours, "ours", "theirs")
    for prompt, each in asked.items():
        more, last = each.rest()
        got[prompt] += more
        assert last.moved is not None
        rest, _ = Asked(pair.theirs, "theirs", prompt, last.moved[1]).rest()
        assert got[prompt] + rest == pair.model.greedy(prompt, MAX_TOKENS)


def test_another_engine_goes_on_after_ours_was_killed(pair: Pair) -> None:
    prompt = prompts(2)[1]
    asked = Asked(pair.ours, "ours", prompt, FRESH)
    got = asked.take(5)
    kill(pair.ours)
    # What its client has got is all that is left of the request.
    tokens = tuple(ChosenToken(token_id=each, logprob=0.0, ranking=None) for each in got)
    resume = Resume(seed=7, max_tokens=MAX_TOKENS, tokens=tokens)
    rest, _ = Asked(pair.theirs, "theirs", prompt, resume).rest()
    assert got + rest == pair.model.greedy(prompt, MAX_TOKENS)


def test_a_setting_that_the_engine_lacks_is_refused_by_name(pair: Pair) -> None:
    asked = Asked(pair.theirs, "theirs", [5], FRESH, min_tokens=3)
    with pytest.raises(triton.InferenceServerException, match="engine transformers can do"):
        asked.next()
    asked.close()
