from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.contract import Dtype, LayerRange
from paraserve_backend.errors import InvalidCheckpoint, UnsupportedModel
from paraserve_backend.families.spec import LinearScaling, Llama3Scaling, Parameter, Rope
from paraserve_backend.families.table import FAMILIES, model_spec
from paraserve_backend.families.tensors import check_tensors, expected_tensors, kv_bytes_per_token
from tests.backend.models import CONFIGS, write_model

OPTIONAL = {name for name in Parameter if name.endswith("_bias")} | {
    Parameter.QUERY_NORM,
    Parameter.KEY_NORM,
}


def make_config(
    architecture: str = "LlamaForCausalLM", /, **overrides: object
) -> dict[str, object]:
    """A config.json as published before transformers 5; `None` removes a field."""
    config: dict[str, object] = {
        "architectures": [architecture],
        "torch_dtype": "bfloat16",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "eos_token_id": 2,
    }
    return {name: value for name, value in (config | overrides).items() if value is not None}


def stage(start: int, end: int, total: int = 6) -> LayerRange:
    return LayerRange(start=start, end=end, total=total)


def test_a_config_is_read_field_by_field() -> None:
    spec = model_spec(make_config())
    assert spec.architecture == "LlamaForCausalLM"
    assert spec.dtype is Dtype.BFLOAT16
    assert (spec.num_layers, spec.hidden_size, spec.intermediate_size) == (6, 64, 96)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (8, 2, 8)
    assert (spec.vocab_size, spec.context_length, spec.norm_eps) == (1000, 4096, 1e-5)
    assert spec.rope == Rope(theta=500000.0)
    assert spec.windows == (None,) * 6
    assert not spec.tie_word_embeddings


@pytest.mark.parametrize("family", CONFIGS)
def test_old_and_new_spellings_read_alike(family: str) -> None:
    architecture = f"{family.capitalize()}ForCausalLM"
    old = make_config(architecture, head_dim=16)
    new = make_config(
        architecture,
        head_dim=16,
        torch_dtype=None,
        dtype="bfloat16",
        rope_theta=None,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    assert model_spec(old) == model_spec(new)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [False, True])
def test_expected_tensors_are_exactly_those_transformers_writes(
    family: str, tied: bool, tmp_path: Path
) -> None:
    model = write_model(tmp_path, family, tie_word_embeddings=tied, head_dim=12)
    written = {name: tuple(tensor.shape) for name, tensor in model.weights.items()}
    assert expected_tensors(model.spec, stage(0, 5, 5)) == written


def test_stages_together_need_what_the_model_needs_and_share_only_a_tied_embedding() -> None:
    for tied in (False, True):
        spec = model_spec(make_config(tie_word_embeddings=tied))
        parts = [expected_tensors(spec, stage(*cut)) for cut in ((0, 1), (1, 4), (4, 6))]
        union: dict[str, tuple[int, ...]] = {}
        for part in parts:
            union |= part
        assert union == expected_tensors(spec, stage(0, 6))
        shared = sum(map(len, parts)) - len(union)
        assert shared == (1 if tied else 0)


@pytest.mark.parametrize(
    ("architecture", "overrides", "expected"),
    [
        ("LlamaForCausalLM", {}, set()),
        (
            "LlamaForCausalLM",
            {"attention_bias": True, "mlp_bias": True},
            {name for name in Parameter if name.endswith("_bias")},
        ),
        ("MistralForCausalLM", {}, set()),
        (
            "Qwen2ForCausalLM",
            {},
            {Parameter.QUERY_BIAS, Parameter.KEY_BIAS, Parameter.VALUE_BIAS},
        ),
        ("Qwen3ForCausalLM", {}, {Parameter.QUERY_NORM, Parameter.KEY_NORM}),
    ],
)
def test_families_differ_in_their_optional_parameters(
    architecture: str, overrides: Mapping[str, object], expected: set[Parameter]
) -> None:
    spec = model_spec(make_config(architecture, **overrides))
    present = {tensor.parameter for tensor in spec.layer_tensors}
    assert present & OPTIONAL == expected
    assert present | OPTIONAL == set(Parameter)


@pytest.mark.parametrize("inside", [True, False])
def test_llama3_scaling_is_read_from_both_places(inside: bool) -> None:
    scaling: dict[str, object] = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 8192,
    }
    config = (
        make_config(rope_theta=None, rope_parameters=scaling | {"rope_theta": 10.0})
        if inside
        else make_config(rope_theta=10.0, rope_scaling=scaling)
    )
    assert model_spec(config).rope == Rope(
        theta=10.0,
        scaling=Llama3Scaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
        ),
    )


def test_the_oldest_spelling_of_scaling_and_a_missing_base_are_read() -> None:
    config = make_config(rope_theta=None, rope_scaling={"type": "linear", "factor": 4})
    assert model_spec(config).rope == Rope(theta=10000.0, scaling=LinearScaling(factor=4.0))


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "mrope"])
def test_unknown_scaling_is_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"RoPE scaling '{kind}'"):
        model_spec(make_config(rope_scaling={"rope_type": kind, "factor": 2.0}))


@pytest.mark.parametrize(
    ("architecture", "overrides", "expected"),
    [
        ("MistralForCausalLM", {"sliding_window": 128}, (128,) * 6),
        ("Qwen2ForCausalLM", {"sliding_window": 128, "use_sliding_window": False}, (None,) * 6),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 4},
            (None,) * 4 + (128,) * 2,
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 128,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 3,
            },
            (128, None) * 3,
        ),
    ],
)
def test_sliding_windows_are_read_per_layer(
    architecture: str, overrides: Mapping[str, object], expected: tuple[int | None, ...]
) -> None:
    assert model_spec(make_config(architecture, **overrides)).windows == expected


@pytest.mark.parametrize(
    ("in_config", "in_generation_config", "expected"),
    [
        (2, None, (2,)),
        ([1, 2], None, (1, 2)),
        (None, None, ()),
        (2, {"eos_token_id": [2, 5]}, (2, 5)),
        (2, {"eos_token_id": 7}, (7,)),
        (2, {"temperature": 0.6}, (2,)),
    ],
)
def test_end_tokens_of_the_generation_config_win(
    in_config: object, in_generation_config: dict[str, object] | None, expected: tuple[int, ...]
) -> None:
    spec = model_spec(make_config(eos_token_id=in_config), in_generation_config)
    assert spec.eos_token_ids == expected


def test_an_unknown_architecture_is_named_with_those_supported() -> None:
    with pytest.raises(UnsupportedModel, match="BertModel is not supported") as caught:
        model_spec(make_config("BertModel"))
    for name in FAMILIES:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantized .'awq'."),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'.*bfloat16"),
    ],
)
def test_variants_we_cannot_run_are_refused_by_name(
    overrides: Mapping[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        model_spec(make_config(**overrides))


@pytest.mark.parametrize(
    "field",
    [
        "architectures",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "torch_dtype",
    ],
)
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=f"config.json: the field '{field}' is missing"):
        model_spec(make_config(**{field: None}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vocab_size": "many"}, "'vocab_size' is 'many', expected a whole number above zero"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0"),
        ({"hidden_size": True}, "'hidden_size' is True"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan, expected a number above zero"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' is 1, expected true or false"),
        ({"architectures": "Llama"}, "'architectures' is 'Llama', expected a list of strings"),
        ({"rope_scaling": [1]}, r"'rope_scaling' is \[1\], expected an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling in config.json: the field 'factor'"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters .* 'rope_theta'"),
        ({"eos_token_id": "</s>"}, "'eos_token_id' is '</s>', expected a token id"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, "hidden_size 64 is not a multiple"),
        ({"head_dim": 9}, "head_dim 9 is odd"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(
    overrides: Mapping[str, object], message: str
) -> None:
    with pytest.raises(InvalidCheckpoint, match=message):
        model_spec(make_config(**overrides))


@given(
    field=st.sampled_from(sorted(make_config())),
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=3,
    ),
)
def test_any_json_in_a_field_is_read_or_refused_by_us(field: str, value: object) -> None:
    # Any other exception, or a spec that is none, would mean that a field was trusted.
    with contextlib.suppress(InvalidCheckpoint, UnsupportedModel):
        assert model_spec(make_config() | {field: value}).num_layers > 0


def test_a_checkpoint_that_lacks_a_tensor_is_refused() -> None:
    spec = model_spec(make_config())
    stored = expected_tensors(spec, stage(0, 6))
    del stored["model.layers.3.mlp.up_proj.weight"]
    check_tensors(spec, stage(0, 3), stored)
    with pytest.raises(InvalidCheckpoint, match=r"lacks the tensor 'model\.layers\.3\.mlp\.up_pr"):
        check_tensors(spec, stage(3, 6), stored)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes() -> None:
    spec = model_spec(make_config())
    stored = expected_tensors(spec, stage(0, 6)) | {"lm_head.weight": (1001, 64)}
    check_tensors(spec, stage(0, 5), stored)
    with pytest.raises(InvalidCheckpoint, match=r"lm_head.weight.*\[1001, 64\].*\[1000, 64\]"):
        check_tensors(spec, stage(5, 6), stored)


def test_kv_bytes_grow_with_layers_and_type() -> None:
    spec = model_spec(make_config())
    assert kv_bytes_per_token(spec, stage(2, 5)) == 3 * (2 * 2 * 8) * 2


@pytest.mark.parametrize("family", CONFIGS)
def test_defaults_of_transformers_itself_are_read(family: str) -> None:
    config: Any = CONFIGS[family](dtype="float16")
    assert isinstance(config, transformers.PreTrainedConfig)
    fields = json.loads(config.to_json_string(use_diff=False))
    spec = model_spec(fields | {"architectures": [f"{family.capitalize()}ForCausalLM"]})
    assert spec.num_layers == fields["num_hidden_layers"]
    assert spec.head_dim == fields.get("head_dim", 128)
    assert spec.rope.theta == fields["rope_parameters"]["rope_theta"]
