"""Rotary position encoding, with the scalings that stretch a model's context."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from paraserve_backend.families.spec import LinearScaling, Llama3Scaling, Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Cosines and sines of a batch's positions, `[tokens, 1, head_dim]`.

    The first half of `sin` is negated, so that turning a pair needs no negation of its own.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def apply(self, heads: torch.Tensor) -> torch.Tensor:
        """Turn `[tokens, heads, head_dim]`, where dimension i pairs with i + head_dim / 2."""
        swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
        return (heads * self.cos).add_(swapped.mul_(self.sin))


def rotation(frequencies: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> Rotation:
    """The rotation of `positions` `[tokens]`, computed in float32 and rounded to `dtype`."""
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return Rotation(
        cos=torch.cat((cos, cos), dim=-1).to(dtype).unsqueeze(1),
        sin=torch.cat((-sin, sin), dim=-1).to(dtype).unsqueeze(1),
    )


def frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions, float32 `[head_dim / 2]`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    base = 1.0 / rope.theta**exponents
    match rope.scaling:
        case None:
            return base
        case LinearScaling(factor=factor):
            return base / factor
        case Llama3Scaling():
            return _llama3(base, rope.scaling)


def _llama3(base: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    turns = scaling.original_context * base / (2 * math.pi)
    # 0 where a dimension turns too rarely for the old context to have shown it all, 1 where often.
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * base / scaling.factor + kept * base
