"""What a config.json says, with a default for everything."""

from __future__ import annotations


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
        "ffn_dim": 96,
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
