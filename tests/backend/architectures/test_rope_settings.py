from __future__ import annotations

import contextlib
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.architectures.registry import model_spec
from paraserve_backend.architectures.spec import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)
from paraserve_backend.engines.native.model.rope import frequencies
from paraserve_backend.errors import InvalidCheckpoint, UnsupportedModel
from tests.support.config_json import make_config

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "dynamic", "factor": 2.0}, None),
        ({"type": "linear", "factor": 4}, LinearScaling(factor=4.0)),
        (
            {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 512},
            Llama3Scaling(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=512
            ),
        ),
        (
            {"type": "yarn", "original_max_position_embeddings": 1024},
            YarnScaling(
                factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=True, original_context=1024
            ),
        ),
        (
            {"rope_type": "longrope", "short_factor": [1, 2, 3, 4.5]},
            LongRopeScaling(factors=(1.0, 2.0, 3.0, 4.5), original_context=4096),
        ),
    ],
)
def test_scalings_are_read_from_both_places(
    field: str, section: Mapping[str, object], expected: RopeScaling | None
) -> None:
    spec = model_spec(make_config(**{field: {**section, "rope_theta": 10.0}}))
    assert isinstance(spec.positions, Rope)
    assert (spec.positions.theta, spec.positions.scaling) == (10.0, expected)


def test_the_base_frequency_lies_inside_outside_or_is_the_usual_one() -> None:
    inside = {"rope_type": "default", "rope_theta": 7.0}
    assert theta(make_config(rope_parameters=inside)) == 7.0
    assert theta(make_config(rope_parameters={"rope_type": "default"})) == 500000.0
    assert theta(make_config(rope_theta=None)) == 10000.0


def test_phi_has_its_own_names_for_scaling_and_turns_part_of_a_head() -> None:
    for name in ("su", "yarn", "longrope"):
        spec = model_spec(
            make_config(
                "Phi3ForCausalLM",
                partial_rotary_factor=0.5,
                original_max_position_embeddings=1024,
                rope_scaling={"type": name, "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]},
            )
        )
        assert isinstance(spec.positions, Rope)
        assert spec.positions.dim == 4
        assert spec.positions.scaling == LongRopeScaling(factors=(1.0, 2.0), original_context=1024)
        assert spec.context_length == 1024


@pytest.mark.parametrize("kind", ["su", "mrope", "proportional"])
def test_unknown_scaling_is_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"RoPE scaling '{kind}'.*llama3, yarn, longrope"):
        model_spec(make_config(rope_scaling={"rope_type": kind, "factor": 2.0}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling in config.json: the field 'factor'"),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1}},
            "'high_freq_factor' must be above 'low_freq_factor'",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "'short_factor' has 1 numbers, expected 4",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": 2}},
            "'short_factor' is 2, expected a list of numbers above zero",
        ),
        ({"rope_theta": 1}, "'rope_theta' is 1.0, expected a number above 1"),
        ({"head_dim": 9}, "pairs of dimensions, but there are 9"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(
    overrides: Mapping[str, object], message: str
) -> None:
    with pytest.raises(InvalidCheckpoint, match=message):
        model_spec(make_config(**overrides))


@given(
    kind=st.sampled_from(["linear", "dynamic", "llama3", "yarn", "longrope"]),
    numbers=st.dictionaries(
        st.sampled_from(
            [
                "factor",
                "rope_theta",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "low_freq_factor",
                "high_freq_factor",
                "attention_factor",
                "original_max_position_embeddings",
            ]
        ),
        st.integers() | st.floats(),
    ),
)
def test_any_numbers_in_a_scaling_are_read_or_refused_by_us(
    kind: str, numbers: dict[str, float]
) -> None:
    section = {"rope_type": kind, "short_factor": [1.0] * 4, **numbers}
    with contextlib.suppress(InvalidCheckpoint, UnsupportedModel):
        spec = model_spec(make_config(rope_scaling=section))
        assert isinstance(spec.positions, Rope)
        assert frequencies(spec.positions).shape == (4,)


def theta(config: Mapping[str, object]) -> float:
    positions = model_spec(config).positions
    assert isinstance(positions, Rope)
    return positions.theta
