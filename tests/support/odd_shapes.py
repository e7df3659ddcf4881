"""Odd shapes of tiny models: numbers that no published model has, drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

#: Longer than what the tests run, so that it decides nothing but where scalings begin.
CONTEXT = 256

Fields = Mapping[str, Any]


def odd_shape(family: str, seed: int) -> Fields:
    """Fields of a config; what a family does not have is left out."""
    random = Random(f"{family} {seed}")
    common = {
        "vocab_size": random.randrange(120, 260),
        "num_hidden_layers": random.randrange(4, 7),
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": random.random() < 0.3,
    }
    return {**common, **_SHAPES[family](random)}


def rope_fields(kind: str, pairs: int) -> Fields:
    """A scaling that changes what the tests run; `pairs` of dimensions are rotated."""
    theta = {"rope_theta": 1_000.0}
    match kind:
        case "default":
            return {**theta, "rope_type": kind}
        case "linear" | "dynamic":
            return {**theta, "rope_type": kind, "factor": 3.0}
        case "llama3":
            return {
                **theta,
                "rope_type": kind,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        case "yarn":
            return {
                **theta,
                "rope_type": kind,
                "factor": 4.0,
                "beta_fast": 8.0,
                "original_max_position_embeddings": CONTEXT // 4,
            }
    return {
        **theta,
        "rope_type": "longrope",
        "short_factor": [1.0 + pair / 4 for pair in range(pairs)],
        "long_factor": [2.0 + pair for pair in range(pairs)],
        "original_max_position_embeddings": CONTEXT // 2,
    }


def _llama(random: Random) -> Fields:
    head_dim = random.choice([6, 10, 14, 18])
    kind = random.choice(["default", "linear", "dynamic", "llama3", "yarn", "longrope"])
    return {
        **_free_heads(random, head_dim),
        "attention_bias": random.random() < 0.3,
        "mlp_bias": random.random() < 0.3,
        "rope_parameters": rope_fields(kind, head_dim // 2),
    }


def _mistral(random: Random) -> Fields:
    head_dim = random.choice([6, 10, 14, 18])
    return {**_free_heads(random, head_dim), "sliding_window": random.choice([None, 2, 5, 17])}


def _qwen2(random: Random) -> Fields:
    return {
        **_free_heads(random, random.choice([6, 10, 14, 18])),
        "use_sliding_window": random.random() < 0.7,
        "sliding_window": random.choice([3, 11]),
        "max_window_layers": random.randrange(4),
    }


def _gemma2(random: Random) -> Fields:
    return {
        **_free_heads(random, random.choice([6, 10, 14, 18])),
        "sliding_window": random.choice([3, 11, CONTEXT]),
        "query_pre_attn_scalar": random.choice([1, 5, 12]),
        "attn_logit_softcapping": random.choice([None, 2.0, 50.0]),
        "final_logit_softcapping": random.choice([None, 5.0, 30.0]),
    }


def _phi3(random: Random) -> Fields:
    # Some of 16, so that every share of the head is a whole number of pairs.
    share = random.choice([1.0, 0.75, 0.5])
    kv_heads, group = _grouping(random)
    rope = rope_fields(random.choice(["default", "longrope"]), int(16 * share) // 2)
    return {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * group,
        "hidden_size": kv_heads * group * 16,
        "intermediate_size": random.randrange(30, 90),
        "sliding_window": random.choice([None, 7]),
        "partial_rotary_factor": share,
        "original_max_position_embeddings": CONTEXT // 2,
        "rope_parameters": {**rope, "partial_rotary_factor": share},
    }


def _opt(random: Random) -> Fields:
    heads = random.choice([1, 3, 5])
    return {
        "num_attention_heads": heads,
        "hidden_size": heads * random.choice([7, 9, 16]),
        "ffn_dim": random.randrange(30, 90),
        "enable_bias": random.random() < 0.7,
    }


def _falcon(random: Random) -> Fields:
    kv_heads, group = _grouping(random)
    heads = kv_heads * group
    return {
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "hidden_size": heads * random.choice([6, 10, 14]),
        "ffn_hidden_size": random.randrange(30, 90),
        "new_decoder_architecture": random.random() < 0.6,
        "num_ln_in_parallel_attn": random.choice([None, 1]),
        "bias": random.random() < 0.5,
    }


def _free_heads(random: Random, head_dim: int) -> Fields:
    """Heads whose size has nothing to do with the hidden size."""
    kv_heads, group = _grouping(random)
    return {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * group,
        "head_dim": head_dim,
        "hidden_size": kv_heads * group * random.choice([5, 7, 8]),
        "intermediate_size": random.randrange(30, 90),
    }


def _grouping(random: Random) -> tuple[int, int]:
    """Key heads, and query heads that share one."""
    return random.choice([(1, 5), (1, 6), (2, 3), (3, 2), (5, 1), (3, 3)])


_SHAPES = {
    "falcon": _falcon,
    "gemma2": _gemma2,
    "llama": _llama,
    "mistral": _mistral,
    "opt": _opt,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen2,
}
