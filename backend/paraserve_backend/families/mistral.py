"""Mistral: Llama, with a sliding attention window in its first release."""

from __future__ import annotations

from dataclasses import replace

from paraserve_backend.families.common import read_spec
from paraserve_backend.families.config import Config
from paraserve_backend.families.spec import ModelSpec


def read_mistral(config: Config, architecture: str) -> ModelSpec:
    spec = read_spec(config, architecture)
    if not config.has("sliding_window"):
        return spec
    return replace(spec, windows=(config.count("sliding_window"),) * spec.num_layers)
