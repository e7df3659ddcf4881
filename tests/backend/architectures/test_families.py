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

from paraserve_backend.architectures.registry import FAMILIES, model_spec
from paraserve_backend.architectures.spec import (
    Dtype,
    LayerRange,
    LearnedPositions,
    ModelSpec,
    Module,
    Residual,
    Rope,
)
from paraserve_backend.architectures.tensors import (
    check_tensors,
    expected_tensors,
    kv_bytes_per_token,
)
from paraserve_backend.errors import InvalidCheckpoint, UnsupportedModel
from tests.support.config_json import make_config
from tests.support.models import CONFIGS, write_model
from tests.support.odd_shapes import odd_shape

pytestmark = pytest.mark.usefixtures("one_thread")

ROTARY = [name for name in FAMILIES if name != "OPTForCausalLM"]


def stage(start: int, end: int, total: int = 6) -> LayerRange:
    return LayerRange(start=start, end=end, total=total)


def test_a_config_is_read_field_by_field() -> None:
    spec = model_spec(make_config())
    assert spec.architecture == "LlamaForCausalLM"
    assert spec.dtype is Dtype.BFLOAT16
    assert (spec.num_layers, spec.hidden_size, spec.intermediate_size) == (6, 64, 96)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (8, 2, 8)
    assert (spec.vocab_size, spec.context_length, spec.norm_eps) == (1000, 4096, 1e-5)
    assert spec.positions == Rope(theta=500000.0, dim=8)
    assert spec.attention_scale == 8**-0.5
    assert spec.windows == (None,) * 6
    assert not spec.tie_word_embeddings


@pytest.mark.parametrize("architecture", ROTARY)
def test_old_and_new_spellings_read_alike(architecture: str) -> None:
    old = make_config(architecture)
    new = make_config(
        architecture,
        torch_dtype=None,
        dtype="bfloat16",
        rope_theta=None,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    assert model_spec(old) == model_spec(new)


@pytest.mark.parametrize("shape", range(3))
@pytest.mark.parametrize("family", CONFIGS)
def test_expected_tensors_are_exactly_those_transformers_writes(
    family: str, shape: int, tmp_path: Path
) -> None:
    model = write_model(tmp_path, family, **odd_shape(family, shape))
    written = {name: tuple(tensor.shape) for name, tensor in model.weights.items()}
    total = model.spec.num_layers
    assert expected_tensors(model.spec, stage(0, total, total)) == written


@pytest.mark.parametrize("architecture", FAMILIES)
def test_stages_together_need_what_the_model_needs_and_share_only_a_tied_embedding(
    architecture: str,
) -> None:
    for tied in (False, True):
        spec = model_spec(make_config(architecture, tie_word_embeddings=tied))
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
        ("LlamaForCausalLM", {}, ""),
        ("LlamaForCausalLM", {"attention_bias": True}, "query key value output"),
        ("LlamaForCausalLM", {"mlp_bias": True}, "gate up down"),
        ("MistralForCausalLM", {}, ""),
        ("Qwen2ForCausalLM", {}, "query key value"),
        ("Qwen3ForCausalLM", {}, ""),
        ("Gemma2ForCausalLM", {"attention_bias": True}, "query key value output"),
        ("Phi3ForCausalLM", {}, ""),
        ("FalconForCausalLM", {}, "attention_norm"),
        ("FalconForCausalLM", {"bias": True}, "attention_norm qkv output up down"),
        ("OPTForCausalLM", {"enable_bias": False}, "attention_norm mlp_norm"),
    ],
)
def test_families_differ_in_their_biases(
    architecture: str, overrides: Mapping[str, object], expected: str
) -> None:
    spec = model_spec(make_config(architecture, **overrides))
    biased = [module.module for module in spec.layer_modules if module.bias]
    assert set(biased) == {Module(name) for name in expected.split()}


@pytest.mark.parametrize(
    ("overrides", "kv_heads", "norms", "residual"),
    [
        ({}, 1, "input_layernorm", Residual.PARALLEL),
        ({"multi_query": False}, 8, "input_layernorm", Residual.PARALLEL),
        (
            {"parallel_attn": False},
            1,
            "input_layernorm post_attention_layernorm",
            Residual.SEQUENTIAL,
        ),
        (
            {"new_decoder_architecture": True, "num_kv_heads": 2},
            2,
            "ln_attn ln_mlp",
            Residual.PARALLEL,
        ),
        (
            {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
            8,
            "input_layernorm",
            Residual.PARALLEL,
        ),
    ],
)
def test_layouts_of_falcon_are_told_apart(
    overrides: Mapping[str, object], kv_heads: int, norms: str, residual: Residual
) -> None:
    spec = model_spec(make_config("FalconForCausalLM", **overrides))
    assert spec.num_kv_heads == kv_heads
    found = [module.name for module in spec.layer_modules if module.module.endswith("norm")]
    assert found == norms.split()
    assert spec.residual is residual
    assert spec.intermediate_size == 4 * 64


def test_gemma_is_read_with_its_defaults_and_null_switches_a_cap_off() -> None:
    spec = model_spec(make_config("Gemma2ForCausalLM", num_hidden_layers=3))
    assert (spec.attention_softcap, spec.logit_softcap) == (50.0, 30.0)
    assert (spec.attention_scale, spec.embedding_scale) == (256**-0.5, 8.0)
    assert spec.windows == (4096, None, 4096)
    assert spec.tie_word_embeddings
    uncapped = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    spec = model_spec(make_config("Gemma2ForCausalLM") | uncapped)
    assert (spec.attention_softcap, spec.logit_softcap) == (None, None)


def test_opt_has_positions_of_its_own_and_may_lack_a_final_norm() -> None:
    spec = model_spec(make_config("OPTForCausalLM"))
    assert spec.positions == LearnedPositions(offset=2)
    tensors = expected_tensors(spec, stage(0, 1))
    assert tensors["model.decoder.embed_positions.weight"] == (4098, 64)
    assert "model.decoder.embed_positions.weight" not in expected_tensors(spec, stage(1, 6))
    assert [name.rpartition(".")[2] for name in spec.names.final] == ["weight", "bias"]
    for without in ({"do_layer_norm_before": False}, {"_remove_final_layer_norm": True}):
        assert model_spec(make_config("OPTForCausalLM", **without)).names.final == ()


@pytest.mark.parametrize(
    ("architecture", "overrides", "expected"),
    [
        ("MistralForCausalLM", {"sliding_window": 128}, (128,) * 6),
        ("MistralForCausalLM", {}, (4096,) * 6),
        ("Phi3ForCausalLM", {"sliding_window": 128}, (128,) * 6),
        ("Phi3ForCausalLM", {}, (None,) * 6),
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


def test_null_switches_a_window_off_that_is_there_by_default() -> None:
    config = make_config("MistralForCausalLM") | {"sliding_window": None}
    assert model_spec(config).windows == (None,) * 6


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
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'.*silu"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'.*bfloat16"),
    ],
)
def test_variants_we_cannot_run_are_refused_by_name(
    overrides: Mapping[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        model_spec(make_config(**overrides))


@pytest.mark.parametrize(
    ("architecture", "overrides", "message"),
    [
        ("FalconForCausalLM", {"alibi": True}, "alibi"),
        (
            "FalconForCausalLM",
            {"new_decoder_architecture": True, "parallel_attn": False},
            "but not parallel_attn",
        ),
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "bidirectional"),
        ("OPTForCausalLM", {"word_embed_proj_dim": 32}, "word_embed_proj_dim 32.*hidden_size 64"),
        ("OPTForCausalLM", {"layer_norm_elementwise_affine": False}, "elementwise_affine"),
        ("OPTForCausalLM", {"activation_function": "tanh"}, "activation_function 'tanh'"),
        ("OPTForCausalLM", {"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ("FalconForCausalLM", {"quantization_config": {"quant_method": "gptq"}}, "quantized"),
    ],
)
def test_variants_of_a_family_we_cannot_run_are_refused_by_name(
    architecture: str, overrides: Mapping[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        model_spec(make_config(architecture, **overrides))


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
        ({"eos_token_id": "</s>"}, "'eos_token_id' is '</s>', expected a token id"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, "hidden_size 64 is not a multiple"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(
    overrides: Mapping[str, object], message: str
) -> None:
    with pytest.raises(InvalidCheckpoint, match=message):
        model_spec(make_config(**overrides))


@given(
    architecture=st.sampled_from(sorted(FAMILIES)),
    field=st.sampled_from(
        [*make_config(), "rope_scaling", "sliding_window", "num_kv_heads", "alibi", "head_dim"]
    ),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta"]), inner)
        ),
        max_leaves=3,
    ),
)
def test_any_json_in_a_field_is_read_or_refused_by_us(
    architecture: str, field: str, value: object
) -> None:
    # Any other exception, or a spec that is none, would mean that a field was trusted.
    config = make_config(architecture, num_hidden_layers=2) | {field: value}
    if field == "num_hidden_layers" and isinstance(value, int) and value > 1000:
        return  # honest, but a spec has a window per layer
    with contextlib.suppress(InvalidCheckpoint, UnsupportedModel):
        assert model_spec(config).num_layers > 0


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
    names = {name.removesuffix("ForCausalLM").lower(): name for name in FAMILIES}
    spec = model_spec(fields | {"architectures": [names[family]]})
    assert spec.num_layers == fields["num_hidden_layers"]
    assert spec.head_dim == (getattr(config, "head_dim", None) or head_dim(spec))
    if isinstance(spec.positions, Rope):
        assert spec.positions.theta == fields["rope_parameters"]["rope_theta"]


def head_dim(spec: ModelSpec) -> int:
    return spec.hidden_size // spec.num_heads
