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
    head_tensor_name,
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
        (2, {"eos_token_id": None}, (2,)),
        (2, {"eos_token_id": -1}, ()),
        (2, {"eos_token_id": []}, ()),
        (-1, None, ()),
        ([1, -1], None, (1,)),
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


def test_a_type_that_neither_the_config_nor_the_weights_tell_is_asked_for() -> None:
    sentence = "config.json: the field 'dtype' is missing: add it, with one of float32, bfloat16"
    with pytest.raises(InvalidCheckpoint, match=sentence):
        model_spec(make_config(torch_dtype=None))


def test_a_config_that_does_not_say_what_it_is_of_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"Architecture \(none\) is not supported"):
        model_spec(make_config(architectures=None))


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
        ({"eos_token_id": True}, "'eos_token_id' is True, expected a token id"),
        ({"eos_token_id": [1.0]}, r"'eos_token_id' is \[1.0\], expected a token id"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple"),
        (
            {"num_attention_heads": 80, "num_key_value_heads": 80},
            "num_attention_heads 80 is more than hidden_size 64",
        ),
    ],
)
def test_a_field_that_makes_no_sense_is_named(
    overrides: Mapping[str, object], message: str
) -> None:
    with pytest.raises(InvalidCheckpoint, match=message):
        model_spec(make_config(**overrides))


@pytest.mark.parametrize("architecture", ["FalconForCausalLM", "OPTForCausalLM"])
def test_heads_that_do_not_share_out_the_hidden_size_are_refused(architecture: str) -> None:
    with pytest.raises(
        InvalidCheckpoint, match="hidden_size 64 is not a multiple of num_attention"
    ):
        model_spec(make_config(architecture, num_attention_heads=6))


#: What a config.json may state at most: everything is built from these.
MOST = {
    "num_hidden_layers": 1000,
    "vocab_size": 10**7,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "ffn_dim": 10**7,
    "ffn_hidden_size": 10**7,
    "num_attention_heads": 10**4,
    "num_key_value_heads": 10**4,
    "num_kv_heads": 10**4,
    "head_dim": 10**5,
    "max_position_embeddings": 10**9,
    "n_embed": 10**6,
    "word_embed_proj_dim": 10**6,
}


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("value", [1, 10**8, 2**53, 10**4000])
def test_a_count_that_no_model_has_is_refused_before_anything_is_built(
    architecture: str, value: int
) -> None:
    for field, most in MOST.items():
        config = make_config(architecture, new_decoder_architecture=True) | {field: most + value}
        if is_read(config, field):
            with pytest.raises(InvalidCheckpoint, match=f"'{field}' is .* up to {most}"):
                model_spec(config)


def is_read(config: Mapping[str, object], field: str) -> bool:
    """Whether the family has that field at all."""
    with contextlib.suppress(InvalidCheckpoint, UnsupportedModel):
        model_spec({**config, field: "odd"})
        return False
    return True


def test_a_scaling_that_makes_an_absurd_context_is_refused() -> None:
    scaling = {"type": "yarn", "factor": 1e30}
    with pytest.raises(InvalidCheckpoint, match=r"makes a context of 4\.1e\+33 tokens"):
        model_spec(make_config(rope_scaling=scaling))


@pytest.mark.parametrize(
    ("architectures", "model_type", "expected"),
    [
        (None, "llama", "LlamaForCausalLM"),
        ([], "qwen2", "Qwen2ForCausalLM"),
        (["LLaMAForCausalLM"], "llama", "LlamaForCausalLM"),
        (["LLaMAForCausalLM"], None, "LlamaForCausalLM"),
        # Transformers goes by the type.
        (["LlamaForCausalLM"], "mistral", "MistralForCausalLM"),
        (["LlamaForCausalLM"], "house_model", "LlamaForCausalLM"),
        (["Other", "OPTForCausalLM"], None, "OPTForCausalLM"),
    ],
)
def test_a_family_is_found_by_its_type_and_its_architecture(
    architectures: list[str] | None, model_type: str | None, expected: str
) -> None:
    config = make_config(architectures=architectures, model_type=model_type)
    assert model_spec(config).architecture == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"architectures": ["Mystery"], "model_type": "llama"}, "Mystery is not supported"),
        ({"architectures": None, "model_type": "bert"}, "Architecture bert is not supported"),
    ],
)
def test_what_neither_name_leads_to_is_refused(
    overrides: Mapping[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        model_spec(make_config(**overrides))


@pytest.mark.parametrize(
    ("fields", "stored", "expected"),
    [
        ({}, Dtype.BFLOAT16, Dtype.BFLOAT16),
        ({"torch_dtype": "float16"}, Dtype.BFLOAT16, Dtype.FLOAT16),
        ({"dtype": "float32", "torch_dtype": "float16"}, Dtype.BFLOAT16, Dtype.FLOAT32),
        ({"dtype": None, "torch_dtype": "float16"}, Dtype.BFLOAT16, Dtype.FLOAT16),
        ({"dtype": None, "torch_dtype": None}, Dtype.FLOAT16, Dtype.FLOAT16),
        ({"dtype": "half"}, Dtype.BFLOAT16, Dtype.FLOAT16),
        ({"dtype": "float"}, Dtype.BFLOAT16, Dtype.FLOAT32),
    ],
)
def test_the_type_is_the_configs_or_that_of_the_weights(
    fields: Mapping[str, object], stored: Dtype, expected: Dtype
) -> None:
    config = {**make_config(torch_dtype=None), **fields}
    assert model_spec(config, dtype=stored).dtype is expected


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_stored_head_is_used_though_it_is_said_to_be_the_embedding(architecture: str) -> None:
    config = make_config(architecture, tie_word_embeddings=True)
    tied = model_spec(config)
    embedding, head = tied.names.embedding[0], tied.names.head
    assert head_tensor_name(tied) == embedding
    assert model_spec(config, tensors=[embedding]) == tied
    assert head_tensor_name(model_spec(config, tensors=[embedding, head])) == head
    # As in transformers: the one that is there is both.
    only_head = model_spec(config, tensors=[head])
    assert (only_head.names.embedding[0], head_tensor_name(only_head)) == (head, head)
    untied = make_config(architecture, tie_word_embeddings=False)
    assert model_spec(untied, tensors=[head]) == model_spec(untied)


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
