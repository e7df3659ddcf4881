"""The torch spelling of `contract.Dtype`."""

from __future__ import annotations

import torch

from paraserve_backend.protocol.names import Dtype

TORCH_DTYPE = {
    Dtype.FLOAT32: torch.float32,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
}
