"""The short form of `make fuzz`."""

from __future__ import annotations

import json
import random

import pytest

from integration.fuzz.__main__ import result
from integration.fuzz.detokenizers import Detokenizers
from integration.fuzz.runner import ROUNDS, Outcome, fuzz
from integration.fuzz.session import run
from integration.fuzz.target import Case, ServerError


async def test_random_input_breaks_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = await run(4000, seed=1)
    assert not outcome.findings, capsys.readouterr().out
    assert outcome.num_inputs == 4000
    assert len(outcome.resident_bytes) == ROUNDS


class Broken:
    """A target whose every input does what it must not."""

    name = "broken"

    def __init__(self, error: BaseException | None) -> None:
        self._error = error

    def case(self, rng: random.Random) -> Case:
        async def do() -> None:
            if self._error is not None:
                raise self._error
            while True:  # until the limit of processor time ends it
                pass

        return Case(shown=f"input {rng.random()}", run=do)


class Panic(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("x"), "crashes"),
        (Panic("x"), "crashes"),
        (ServerError("x"), "http_500"),
        (TimeoutError(), "hangs"),
        (None, "hangs"),
    ],
)
async def test_what_breaks_is_found_and_shown_with_its_seed_and_input(
    error: BaseException | None, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = await fuzz({Broken(error): 1}, 7, after_round=lambda: None)
    assert dict(outcome.findings) == {kind: 1}
    shown = capsys.readouterr().out
    assert shown.startswith(f"{kind}: seed 7 broken 0: ")
    assert f"input {random.Random('7 broken 0').random()}" in shown


def test_a_seed_makes_the_same_inputs_again() -> None:
    first, second = (Detokenizers().case(random.Random("1 x 2")).shown for _ in range(2))
    assert first == second
    assert first != Detokenizers().case(random.Random("1 x 3")).shown


def test_the_last_line_says_whether_the_targets_were_met() -> None:
    well = Outcome(num_inputs=100_000, resident_bytes=[10**9, 10**9 + 30_000_000])
    assert result(well)["met"] is True
    for bad in (
        Outcome(num_inputs=99_999, resident_bytes=[10**9, 10**9]),
        Outcome(num_inputs=100_000, resident_bytes=[10**9, 10**9 + 31_000_000]),
    ):
        assert result(bad)["met"] is False
    for kind in ("crashes", "hangs", "http_500"):
        bad = Outcome(num_inputs=100_000, resident_bytes=[10**9, 10**9])
        bad.findings[kind] += 1
        assert result(bad)["met"] is False
    assert json.loads(json.dumps(result(well)))["bench"] == "fuzz"
