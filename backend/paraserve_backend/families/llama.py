"""Llama and the models that are Llama by another name."""

from __future__ import annotations

from paraserve_backend.families.common import ATTENTION_BIASES, MLP_BIASES, read_spec
from paraserve_backend.families.config import Config
from paraserve_backend.families.spec import ModelSpec, Parameter


def read_llama(config: Config, architecture: str) -> ModelSpec:
    optional: set[Parameter] = set()
    if config.flag("attention_bias", False):
        optional |= ATTENTION_BIASES
    if config.flag("mlp_bias", False):
        optional |= MLP_BIASES
    return read_spec(config, architecture, optional=optional)
