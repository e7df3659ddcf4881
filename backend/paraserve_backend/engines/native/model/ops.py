"""The operations that layers are made of: projections, norms, activations, soft caps.

They compute directly on the weights and round where transformers rounds, so that greedy tokens are
the same. Which matrix kernel a CPU uses is chosen here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.backends import mkldnn
from torch.nn.functional import gelu, layer_norm, linear, silu

from paraserve_backend.architectures.spec import Activation, Normalisation

#: Whether this machine's processors multiply matrices of bfloat16 in tiles.
HAS_AMX = "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """One module's tensors."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map `[tokens, inputs]` to `[tokens, outputs]` with a weight `[outputs, inputs]`."""
        if len(hidden) == 1 and self.bias is None and hidden.device.type == "cpu":
            # Decoding one sequence.
            is_own_faster = hidden.dtype is torch.bfloat16 and not HAS_AMX
            with _without_onednn() if is_own_faster else nullcontext():
                return torch.mv(self.weight, hidden[0])[None]
        return linear(hidden, self.weight, self.bias)


#: A switch of the whole process. Its types know `enabled` as a descriptor only.
_onednn: Any = mkldnn


@contextmanager
def _without_onednn() -> Iterator[None]:
    """For one row PyTorch's own kernels read bfloat16 weights twice as fast, but not beside AMX.

    Measured: on an EPYC with AVX-512 so, on a Xeon with AMX oneDNN is 1.3 to 1.9 times as fast.
    """
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
