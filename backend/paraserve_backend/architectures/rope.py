"""Reads rotary positions from config.json: base frequency, scalings, and the context we serve.

The computation is in `engines.native.model.rope`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from paraserve_backend.architectures.config_json import Config
from paraserve_backend.architectures.spec import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)
from paraserve_backend.errors import UnsupportedModel

#: What transformers assumes where a config.json names no base frequency.
_DEFAULT_THETA = 10_000.0
#: No model was made for more tokens; what is built per token of context is built for no more.
_LONGEST_CONTEXT = 1_000_000_000
_SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def rope_section(config: Config) -> Config:
    """Where transformers reads the scaling: the old field, if it holds one, before the new."""
    old = config.section("rope_scaling")
    return config.section("rope_parameters") if old.is_empty else old


def read_rope(config: Config, dim: int, *, renamed: Mapping[str, str] | None = None) -> Rope:
    """Read the rotation of `dim` dimensions; `renamed` gives the names of today for old ones.

    Raises:
        UnsupportedModel: the scaling is not one we know.
    """
    if dim < 2 or dim % 2:
        raise config.invalid(f"rotary positions turn pairs of dimensions, but there are {dim}")
    section = rope_section(config)
    theta = section.number("rope_theta", config.number("rope_theta", _DEFAULT_THETA))
    if theta <= 1:
        raise config.invalid(f"'rope_theta' is {theta}, expected a number above 1")
    kind = section.text("rope_type", section.text("type", "default"))
    kind = (renamed or {}).get(kind, kind)
    match kind:
        # Within `max_position_embeddings` transformers computes "dynamic" without scaling, and
        # `context_length` admits nothing longer. Beyond, a key's angle depends on how long the
        # sequence was when the key was computed, so that tokens would depend on the schedule.
        case "default" | "dynamic":
            return Rope(theta=theta, dim=dim)
        case "linear":
            scaling = LinearScaling(factor=section.number("factor"))
            return Rope(theta=theta, dim=dim, scaling=scaling)
        case "llama3":
            return Rope(theta=theta, dim=dim, scaling=_llama3(config, section))
        case "yarn":
            yarn = _yarn(config, section)
            return Rope(
                theta=theta, dim=dim, scaling=yarn, magnitude=_yarn_magnitude(section, yarn.factor)
            )
        case "longrope":
            long = _longrope(config, section, dim)
            magnitude = _longrope_magnitude(config, section, long.original_context)
            return Rope(theta=theta, dim=dim, scaling=long, magnitude=magnitude)
    raise UnsupportedModel(
        f"RoPE scaling '{kind}' is not supported; supported are {', '.join(_SCALINGS)}."
    )


def context_length(config: Config, longest: int, scaling: RopeScaling | None) -> int:
    """Tokens a sequence may have where `config` says `longest`.

    A model with longrope has other factors, for all its keys, once a sequence outgrows the
    original context. We stop there: keys are cached with the angle they were given.
    """
    match scaling:
        case LongRopeScaling(original_context=original):
            return min(longest, original)
        case YarnScaling(original_context=original, factor=factor):
            # Some configs keep the original length in `max_position_embeddings`.
            scaled = original * factor
            if scaled > _LONGEST_CONTEXT:
                raise config.invalid(f"the RoPE scaling makes a context of {scaled:.3g} tokens")
            return max(longest, int(scaled))
    return longest


def _original_context(config: Config, section: Config) -> int:
    field = "original_max_position_embeddings"
    if config.has(field):
        return config.count(field)
    return section.count(field, config.count("max_position_embeddings"))


def _llama3(config: Config, section: Config) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_context=_original_context(config, section),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise section.invalid("'high_freq_factor' must be above 'low_freq_factor'")
    return scaling


def _yarn(config: Config, section: Config) -> YarnScaling:
    original = _original_context(config, section)
    return YarnScaling(
        factor=section.number("factor", config.count("max_position_embeddings") / original),
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        truncate=section.flag("truncate", True),
        original_context=original,
    )


def _yarn_magnitude(section: Config, factor: float) -> float:
    if section.has("attention_factor"):
        return section.number("attention_factor")
    if not (section.has("mscale") and section.has("mscale_all_dim")):
        return _yarn_share(factor, 1.0)
    return _yarn_share(factor, section.number("mscale")) / _yarn_share(
        factor, section.number("mscale_all_dim")
    )


def _yarn_share(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(config: Config, section: Config, dim: int) -> LongRopeScaling:
    factors = section.numbers("short_factor")
    if len(factors) != dim // 2:
        raise section.invalid(f"'short_factor' has {len(factors)} numbers, expected {dim // 2}")
    return LongRopeScaling(factors=factors, original_context=_original_context(config, section))


def _longrope_magnitude(config: Config, section: Config, original: int) -> float:
    if section.has("attention_factor"):
        return section.number("attention_factor")
    factor = section.number("factor", config.count("max_position_embeddings") / original)
    if factor <= 1.0 or original == 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))
