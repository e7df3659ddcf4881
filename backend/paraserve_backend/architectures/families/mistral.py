"""Mistral: Llama with a sliding attention window in its first release."""

from __future__ import annotations

from dataclasses import replace

from paraserve_backend.architectures.config_json import Config
from paraserve_backend.architectures.decoder import read_spec
from paraserve_backend.architectures.spec import ModelSpec


def read_mistral(config: Config, architecture: str) -> ModelSpec:
    spec = read_spec(config, architecture)
    window = config.count_or_null("sliding_window", 4096)
    return replace(spec, windows=(window,) * spec.num_layers)
