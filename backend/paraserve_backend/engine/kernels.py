"""What layers are made of: projections, norms and activations, straight on the weights.

Numbers are rounded where transformers rounds them, so that greedy tokens agree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.backends import mkldnn
from torch.nn.functional import gelu, layer_norm, linear, silu

from paraserve_backend.families.spec import Activation, Normalisation


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """One module's tensors."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map `[tokens, inputs]` to `[tokens, outputs]` with a weight `[outputs, inputs]`."""
        if len(hidden) == 1 and self.bias is None and hidden.device.type == "cpu":
            # Decoding one sequence.
            with _without_onednn() if hidden.dtype is torch.bfloat16 else nullcontext():
                return torch.mv(self.weight, hidden[0])[None]
        return linear(hidden, self.weight, self.bias)


#: A switch of the whole process. Its types know `enabled` as a descriptor only.
_onednn: Any = mkldnn


@contextmanager
def _without_onednn() -> Iterator[None]:
    """For one row it reads bfloat16 weights half as fast as PyTorch's own kernels (measured)."""
    was_enabled = _onednn.enabled
    _onednn.enabled = False
    try:
        yield
    finally:
        _onednn.enabled = was_enabled


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """Scales the last dimension and gives it the parameters' weight and bias."""

    kind: Normalisation
    eps: float
    parameters: Parameters

    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = self.parameters.weight
        if self.kind is Normalisation.LAYER:
            return layer_norm(hidden, weight.shape, weight, self.parameters.bias, self.eps)
        wide = hidden.float()
        scale = wide.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        if self.kind is Normalisation.RMS_PLUS_ONE:
            return (wide * scale * (1.0 + weight.float())).to(hidden.dtype)
        return (wide * scale).to(hidden.dtype) * weight


def level_off(scores: torch.Tensor, cap: float) -> torch.Tensor:
    """Bend `scores` towards plus and minus `cap`; overwrites them."""
    return scores.div_(cap).tanh_().mul_(cap)


#: They may overwrite their argument.
ACTIVATIONS: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SILU: lambda hidden: silu(hidden, inplace=True),
    Activation.RELU: torch.relu_,
    Activation.GELU: gelu,
    Activation.GELU_TANH: lambda hidden: gelu(hidden, approximate="tanh"),
}
