"""Every field of every family, absent, null and odd: we compute what transformers computes.

Each case is a config.json that differs in one field from a plain one. Where transformers makes a
model of it that runs, ours has the same tensors and the same logits. Where it does not, we refuse
with a sentence or fill in a default; nothing else may come of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from paraserve_backend.architectures.registry import FAMILIES, model_spec
from paraserve_backend.architectures.spec import LayerRange, ModelSpec
from paraserve_backend.architectures.tensors import expected_tensors
from paraserve_backend.errors import InvalidCheckpoint, UnsupportedModel
from tests.support.models import CONFIGS, FAMILY_FIELDS, TINY, Chain, TinyModel

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES: Mapping[str, Any] = CONFIGS
BY_TYPE = {family.model_type: family for family in FAMILIES.values()}
ARCHITECTURES = {family.model_type: name for name, family in FAMILIES.items()}
#: Longer than the windows below.
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]
ABSENT = object()
#: Values that a published config has had or could have; all others are absent and null.
ODD: Mapping[str, tuple[object, ...]] = {
    "vocab_size": (0, "199", 199.0),
    "hidden_size": (0, -48, 50),
    "num_hidden_layers": (0, 1, True),
    "num_attention_heads": (0, 3, 2),
    "num_key_value_heads": (0, 1, 4, 3, "2"),
    "num_kv_heads": (0, 1, 4),
    "head_dim": (0, 6, 9, 32),
    "hidden_act": ("swish", "gelu", "relu", "gelu_pytorch_tanh", "SiLU", "", 1),
    "hidden_activation": ("swish", "gelu", "gelu_pytorch_tanh", ""),
    "activation": ("relu", "gelu_pytorch_tanh", ""),
    "activation_function": ("gelu", "silu", ""),
    "max_position_embeddings": (0, 20, 4096.0),
    "rms_norm_eps": (1, 0.5, 0.0, "1e-6"),
    "layer_norm_epsilon": (0.5, 0.0),
    "tie_word_embeddings": (True, "true", 0),
    "attention_bias": (True, 1, "no"),
    "mlp_bias": (True, 1),
    "bias": (True, 1),
    "sliding_window": (3, 0, -1, 1.5),
    "use_sliding_window": (True, 1),
    "max_window_layers": (0, 1, -1),
    "layer_types": (
        ["full_attention", "sliding_attention"],
        ["attention", "sliding_attention"],
        ["sliding_attention"],
        ["linear_attention", "full_attention"],
        [],
    ),
    "query_pre_attn_scalar": (1, 144),
    "final_logit_softcapping": (2.0, 0.0),
    "attn_logit_softcapping": (2.0,),
    "use_bidirectional_attention": (False, True),
    "original_max_position_embeddings": (0, 8),
    "word_embed_proj_dim": (48, 24),
    "do_layer_norm_before": (False, 0),
    "_remove_final_layer_norm": (True,),
    "enable_bias": (False,),
    "layer_norm_elementwise_affine": (False,),
    "n_embed": (48,),
    "num_ln_in_parallel_attn": (1, 2),
    "new_decoder_architecture": (True,),
    "multi_query": (False,),
    "parallel_attn": (False,),
    "alibi": (True,),
    "ffn_hidden_size": (64,),
}
#: What transformers runs with, and we refuse: it computes nothing that anybody could mean.
SENSELESS = {
    ("sliding_window", 0),
    ("sliding_window", -1),
    ("max_position_embeddings", 0),
    ("use_bidirectional_attention", True),
    ("layer_norm_elementwise_affine", False),
    ("word_embed_proj_dim", 24),
    ("alibi", True),
    ("head_dim", 0),
    ("num_hidden_layers", 0),
    ("final_logit_softcapping", 0.0),
    # A head of one dimension, of which rotary positions turn the first two.
    ("num_attention_heads", ABSENT),
}


@dataclass(frozen=True, slots=True)
class Case:
    family: str
    field: str
    value: object

    def __str__(self) -> str:
        value = "absent" if self.value is ABSENT else repr(self.value)
        return f"{self.family}-{self.field}-{value}"

    def config(self) -> dict[str, Any]:
        config = plain(self.family)
        config.pop(self.field, None)
        return config if self.value is ABSENT else config | {self.field: self.value}


def plain(family: str) -> dict[str, Any]:
    """A small config.json with every field that transformers knows."""
    small = {"num_hidden_layers": 2, "max_position_embeddings": 64, "tie_word_embeddings": False}
    written = CLASSES[family](**{**TINY, **FAMILY_FIELDS[family], **small}).to_dict()
    # Follows the hidden size, until it is written down.
    written.pop("word_embed_proj_dim", None)
    return {**written, "architectures": [ARCHITECTURES[family]], "dtype": "float32"}


def cases() -> Iterator[Case]:
    for name, family in BY_TYPE.items():
        for field in (*family.defaults, *(["n_embed"] if name == "falcon" else [])):
            for value in (ABSENT, None, *ODD.get(field, ())):
                yield Case(name, field, value)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_a_field_means_what_it_means_to_transformers(case: Case, tmp_path: Path) -> None:
    compare(case.family, case.config(), may_refuse=senseless(case))


def senseless(case: Case) -> bool:
    return not isinstance(case.value, list) and (case.field, case.value) in SENSELESS


ROPES: Mapping[str, Mapping[str, object]] = {
    "nothing": {},
    "base outside": {"rope_theta": 100.0},
    "base null": {"rope_theta": None},
    "old null": {"rope_theta": 100.0, "rope_scaling": None},
    "old empty": {"rope_theta": 100.0, "rope_scaling": {}},
    "old by type": {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 2}},
    "old by rope_type": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "both kinds": {"rope_scaling": {"type": "x", "rope_type": "linear", "factor": 2.0}},
    "no factor": {"rope_scaling": {"type": "linear"}},
    "factor null": {"rope_scaling": {"type": "linear", "factor": None}},
    "kind null": {"rope_scaling": {"type": None}},
    "old default": {"rope_scaling": {"type": "default"}, "rope_theta": 100.0},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "new": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "new empty": {"rope_parameters": {}},
    "new null": {"rope_parameters": None},
    "new without base": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 100.0},
    "old before new": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn from": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.7,
            "mscale_all_dim": 0.3,
        }
    },
    "yarn outside": {
        "rope_scaling": {"type": "yarn", "factor": 4.0},
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
    "longrope": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + pair / 4 for pair in range(8)],
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 32,
        }
    },
    "longrope of phi": {
        "rope_scaling": {
            "type": "su",
            "short_factor": [1.0 + pair / 4 for pair in range(6)],
            "long_factor": [2.0] * 6,
        },
        "original_max_position_embeddings": 32,
    },
    "longrope without an original context": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + pair / 4 for pair in range(6)],
            "long_factor": [2.0] * 6,
        },
        "max_position_embeddings": 8192,
        "original_max_position_embeddings": ABSENT,
    },
    "part of a head": {"partial_rotary_factor": 0.5},
}
ROTARY = [family for family in BY_TYPE if family != "opt"]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ROTARY)
def test_rotary_positions_mean_what_they_mean_to_transformers(family: str, rope: str) -> None:
    config = plain(family)
    del config["rope_parameters"]
    config |= ROPES[rope]
    compare(family, {name: value for name, value in config.items() if value is not ABSENT})


@pytest.mark.parametrize("family", BY_TYPE)
def test_the_defaults_are_those_of_the_configuration_class(family: str) -> None:
    theirs = {field.name: field.default for field in fields(CLASSES[family])}
    ours = BY_TYPE[family].defaults
    assert ours == {name: theirs[name] for name in ours}


#: What decides nothing that we compute, or has a reader and a test of its own.
ELSEWHERE = {
    *(field.name for field in fields(transformers.PreTrainedConfig)),
    *("attention_dropout", "hidden_dropout", "dropout", "layerdrop", "embd_pdrop", "resid_pdrop"),
    *("initializer_range", "init_std", "use_cache", "pretraining_tp"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters"),
}


@pytest.mark.parametrize("family", BY_TYPE)
def test_no_field_of_the_configuration_class_is_forgotten(family: str) -> None:
    theirs = {field.name for field in fields(CLASSES[family])} - ELSEWHERE
    assert theirs == BY_TYPE[family].defaults.keys()


@pytest.mark.parametrize("family", BY_TYPE)
def test_a_config_that_says_nothing_but_its_type_is_the_class_itself(family: str) -> None:
    bare = {"model_type": family, "dtype": "bfloat16"}
    spec = model_spec(bare)
    with torch.device("meta"):
        oracle = causal_model(CLASSES[family].from_dict(bare))
    assert expected_tensors(spec, whole(spec)) == stored_shapes(oracle)


def compare(family: str, config: dict[str, Any], *, may_refuse: bool = False) -> None:
    oracle = oracle_of(family, config)
    if oracle is None:
        with_our_errors_only(config)
        return
    model, logits = oracle
    try:
        spec = model_spec(config)
    except (InvalidCheckpoint, UnsupportedModel):
        assert may_refuse
        return
    assert expected_tensors(spec, whole(spec)) == stored_shapes(model)
    tiny = TinyModel(folder=Path(), spec=spec, weights=model.state_dict(), oracle=model)
    chain = Chain(tiny)
    batch, ids = chain.request(PROMPT).batch()
    torch.testing.assert_close(chain.logits(batch, ids), logits, rtol=1e-3, atol=1e-3)


def oracle_of(family: str, config: dict[str, Any]) -> tuple[Any, torch.Tensor] | None:
    """A random model and its logits, where transformers makes sense of `config`."""
    torch.manual_seed(0)
    try:
        model = causal_model(CLASSES[family].from_dict(config))
        with torch.inference_mode():
            logits: torch.Tensor = model(torch.tensor([PROMPT])).logits[:, -1]
    except Exception as error:  # whatever it raises, it is no model to it
        print(f"transformers: {error!r}")  # noqa: T201
        return None
    return (model, logits) if logits.isfinite().all() else None


def causal_model(config: transformers.PreTrainedConfig) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model.eval()


def stored_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def with_our_errors_only(config: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidCheckpoint, UnsupportedModel):
        model_spec(config)


def whole(spec: ModelSpec) -> LayerRange:
    return LayerRange(start=0, end=spec.num_layers, total=spec.num_layers)
