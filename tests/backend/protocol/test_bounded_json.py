"""JSON of clients: the same values as Python's parser gives, within limits."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.bounded_json import MAX_DEPTH, MAX_DIGITS, parse_json

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(_VALUES)
def test_what_is_within_the_limits_is_what_python_makes_of_it(value: object) -> None:
    assert parse_json(json.dumps(value), "It") == value


@given(
    st.integers(MAX_DIGITS - 3, 6000),
    st.sampled_from(["{}", "-{}", '{{"a": {}}}', "[[1, {}]]", '{{"a": 1, "a": {}, "a": 2}}']),
)
def test_a_whole_number_of_many_digits_is_refused_wherever_it_is(digits: int, where: str) -> None:
    text = where.format("7" * digits)
    if digits <= MAX_DIGITS:
        assert parse_json(text, "It") == json.loads(text)
    else:
        with pytest.raises(InvalidRequest, match=f"^It has a whole number of {digits} digits"):
            parse_json(text, "It")


@pytest.mark.parametrize("text", ['"{}"', '{{"{}": 1}}', "0.{}", "1e-{}", "{}.5"])
def test_digits_that_are_no_whole_number_are_taken(text: str) -> None:
    parse_json(text.format("7" * 5000), "It")


@given(st.integers(MAX_DEPTH - 3, 5000), st.sampled_from(["[]", '{"a":}']), st.booleans())
def test_what_is_nested_too_deeply_is_refused(depth: int, brackets: str, beside: bool) -> None:
    opened, closed = brackets[:-1], brackets[-1]
    text = opened * (depth - 1) + "[]" + closed * (depth - 1)
    text = f"[1, {text[1:]}" if beside and brackets == "[]" else text
    if depth <= MAX_DEPTH:
        parse_json(text, "It")
    else:
        with pytest.raises(InvalidRequest, match="nested too deeply; 32 levels at most"):
            parse_json(text, "It")


def test_many_shallow_lists_are_no_depth() -> None:
    assert parse_json("[" + "[]," * 1000 + "[{}]]", "It") == [[]] * 1000 + [[{}]]
