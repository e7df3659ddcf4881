"""Torch's dtypes by ours, and hidden states as raw bytes and back.

Hidden states travel as bytes because NumPy has no bfloat16 and the link must not import torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from paraserve_backend.architectures.spec import Dtype


def hidden_to_bytes(hidden: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return the tensor's own memory where it lies on the CPU."""
    rows: npt.NDArray[np.uint8] = hidden.contiguous().view(torch.uint8).cpu().numpy()
    return rows


def hidden_from_bytes(
    data: bytes | bytearray | memoryview | npt.NDArray[Any],
    tokens: int,
    hidden_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """View `data` as hidden states, without copying writable memory.

    Raises:
        ValueError: there are more or fewer bytes than `tokens` rows take.
    """
    flat = np.frombuffer(data, np.uint8)
    expected = tokens * hidden_size * dtype.itemsize
    if flat.size != expected:
        raise ValueError(f"{flat.size} bytes of hidden states where {expected} were due")
    # torch has no read-only tensors and warns; frames and Triton's tensors are writable.
    owned = flat if flat.flags.writeable else flat.copy()
    return torch.frombuffer(owned, dtype=dtype).view(tokens, hidden_size)


TORCH_DTYPE = {
    Dtype.FLOAT32: torch.float32,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
}
