from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from paraserve_backend.architectures.registry import model_spec
from paraserve_backend.architectures.spec import ModelSpec, Rope
from paraserve_backend.engines.native.model.rope import RotaryTable, frequencies

HEAD_DIM = 16
ORIGINAL = 512
SCALINGS: Mapping[str, Mapping[str, object]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn-not-truncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "truncate": False,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 0.7,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn-step": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 1e30,
        "beta_slow": 1e30,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.5, 2.0, 2.5, 4.0, 6.0, 9.0],
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope-attention-factor": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.5, 2.0, 2.5, 4.0, 6.0, 9.0],
        "long_factor": [2.0] * 8,
        "attention_factor": 1.25,
        "original_max_position_embeddings": ORIGINAL,
    },
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_and_magnitude_are_those_of_transformers(scaling: str) -> None:
    config = oracle_config(SCALINGS[scaling])
    kind = config.rope_parameters["rope_type"]
    expected, magnitude = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    rope = read(config).positions
    assert isinstance(rope, Rope)
    torch.testing.assert_close(frequencies(rope), expected, rtol=1e-6, atol=0)
    assert rope.magnitude == pytest.approx(magnitude)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ("linear", 2048),
        ("dynamic", 2048),
        ("llama3", 2048),
        ("yarn", 2048),
        ("longrope", ORIGINAL),
    ],
)
def test_the_context_ends_where_transformers_would_change_the_angles(
    scaling: str, expected: int
) -> None:
    assert read(oracle_config(SCALINGS[scaling])).context_length == expected


def test_yarn_stretches_a_context_that_the_config_gives_unstretched() -> None:
    config = oracle_config({**SCALINGS["yarn"]}, max_position_embeddings=ORIGINAL)
    assert read(config).context_length == 4 * ORIGINAL


def test_dimensions_past_the_rotated_ones_are_left_alone() -> None:
    table = RotaryTable(Rope(theta=10.0, dim=6), 10, torch.device("cpu"), torch.float32)
    heads = torch.randn(4, 3, 10)
    turned = table.rotation(torch.arange(4)).apply(heads)
    torch.testing.assert_close(turned[..., 6:], heads[..., 6:], rtol=0, atol=0)
    torch.testing.assert_close(turned[0], heads[0], rtol=0, atol=0)
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1))
    assert not turned[1:, :, :6].isclose(heads[1:, :, :6]).all()


def oracle_config(scaling: Mapping[str, object], **fields: object) -> Any:
    values: dict[str, Any] = {
        "hidden_size": 4 * HEAD_DIM,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_theta": 5_000.0, **scaling},
        "dtype": "float32",
        **fields,
    }
    return transformers.LlamaConfig(**values)


def read(config: Any) -> ModelSpec:
    return model_spec({**config.to_dict(), "architectures": ["LlamaForCausalLM"]})
