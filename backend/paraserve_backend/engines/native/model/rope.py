"""Computes rotary position encoding, with the scalings that extend a model's context."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from paraserve_backend.architectures.spec import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Cosines and sines of a batch's positions, `[tokens, 1, dim]`.

    The first half of `sin` is negated, so that turning a pair needs no negation of its own.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    #: Dimensions that turn, the first ones of a head; are they the whole head?
    dim: int
    whole_head: bool

    def apply(self, heads: torch.Tensor) -> torch.Tensor:
        """Turn `[tokens, heads, head_dim]`, dimension i with i + dim / 2."""
        if self.whole_head:
            return self._turn(heads)
        turned = self._turn(heads[..., : self.dim])
        return torch.cat((turned, heads[..., self.dim :]), dim=-1)

    def _turn(self, heads: torch.Tensor) -> torch.Tensor:
        swapped = heads.roll(self.dim // 2, dims=-1)
        return (heads * self.cos).add_(swapped.mul_(self.sin))


class RotaryTable:
    """The angles of one model's `rope`, on one device."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        self._frequencies = frequencies(rope).to(device)
        self._rope = rope
        self._whole_head = rope.dim == head_dim
        self._dtype = dtype

    def rotation(self, positions: torch.Tensor) -> Rotation:
        """The rotation of `positions` `[tokens]`, computed in float32 and rounded."""
        angles = positions[:, None].float() * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._rope.magnitude != 1.0:
            cos, sin = cos.mul_(self._rope.magnitude), sin.mul_(self._rope.magnitude)
        return Rotation(
            cos=torch.cat((cos, cos), dim=-1).to(self._dtype).unsqueeze(1),
            sin=torch.cat((-sin, sin), dim=-1).to(self._dtype).unsqueeze(1),
            dim=self._rope.dim,
            whole_head=self._whole_head,
        )


def frequencies(rope: Rope) -> torch.Tensor:
    """Radians per position of each pair of dimensions, float32 `[rope.dim / 2]`."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    base = 1.0 / rope.theta**exponents
    match rope.scaling:
        case None:
            return base
        case LinearScaling(factor=factor):
            return base / factor
        case Llama3Scaling():
            return _llama3(base, rope.scaling)
        case YarnScaling():
            return _yarn(base, rope, rope.scaling)
        case LongRopeScaling(factors=factors):
            return base / torch.tensor(factors)


def _llama3(base: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    turns = scaling.original_context * base / (2 * math.pi)
    # 0 where a dimension turns too rarely for the old context to have shown it all, 1 where often.
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return _blend(base, scaling.factor, kept.clamp(0.0, 1.0))


def _yarn(base: torch.Tensor, rope: Rope, scaling: YarnScaling) -> torch.Tensor:
    first = _pair_with_turns(rope, scaling, scaling.beta_fast)
    last = _pair_with_turns(rope, scaling, scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float32) - first) / (last - first)
    return _blend(base, scaling.factor, 1 - ramp.clamp(0.0, 1.0))


def _pair_with_turns(rope: Rope, scaling: YarnScaling, turns: float) -> float:
    """Which pair of dimensions turns so often in the original context."""
    wavelength = scaling.original_context / (turns * 2 * math.pi)
    return rope.dim * math.log(wavelength) / (2 * math.log(rope.theta))


def _blend(base: torch.Tensor, factor: float, kept: torch.Tensor) -> torch.Tensor:
    return (1 - kept) * base / factor + kept * base
