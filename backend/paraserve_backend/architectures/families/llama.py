"""Llama, and models that are Llama under another name."""

from __future__ import annotations

from paraserve_backend.architectures.config_json import Config
from paraserve_backend.architectures.decoder import ATTENTION, MLP, read_spec
from paraserve_backend.architectures.spec import ModelSpec, Module


def read_llama(config: Config, architecture: str) -> ModelSpec:
    biased: set[Module] = set()
    if config.flag("attention_bias", False):
        biased |= ATTENTION
    if config.flag("mlp_bias", False):
        biased |= MLP
    return read_spec(config, architecture, biased=biased)
