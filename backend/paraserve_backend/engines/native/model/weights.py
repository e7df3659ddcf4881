"""Gives a stage the tensors of a fetch as they land: views of host memory, or copies on a GPU.

On the CPU nothing is copied. Copies to a GPU go through two page-locked buffers on a stream of
their own, so that copying one piece overlaps with reading the next.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from paraserve_backend.errors import UnsupportedModel
from paraserve_backend.weights.checkpoint.safetensors import TensorEntry
from paraserve_backend.weights.tiers.reader import TierReader

#: Safetensors data types that a model can be loaded from.
_TORCH_DTYPE: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_STAGING_BYTES = 32 << 20
#: The longest wait for any one tensor.
_TIMEOUT_S = 600.0


class WeightLoader:
    """Gives one thread a fetch's tensors on `device`, as soon as each has landed.

    CPU tensors share memory with the tier: they are valid until the fetch is released, and must not
    be written to.
    """

    def __init__(self, reader: TierReader, device: torch.device) -> None:
        self._reader = reader
        self._upload = _Upload(device) if device.type == "cuda" else None

    def get(self, name: str) -> torch.Tensor:
        """Return a tensor, waiting until it has landed.

        Raises `NotFound` where the fetch has no such tensor, the fetch's own error if it fails,
        `DeadlineExceeded`, or `UnsupportedModel` for a data type without a torch equivalent.
        """
        entry = self._reader.entry(name)
        self._reader.wait_for(name, timeout_s=_TIMEOUT_S)
        tensor = _adopt(entry, self._reader.view(name))
        return tensor if self._upload is None else self._upload.copy(tensor)


def _adopt(entry: TensorEntry, view: memoryview) -> torch.Tensor:
    """Return a tensor over `view`, which it keeps alive."""
    dtype = _TORCH_DTYPE.get(entry.dtype)
    if dtype is None:
        raise UnsupportedModel(f"tensor {entry.name} has data type {entry.dtype}, not supported")
    if not view:
        return torch.empty(entry.shape, dtype=dtype)
    if entry.start % dtype.itemsize:
        # Files of other writers may pad their header to anything; kernels want aligned items.
        view = memoryview(bytearray(view))
    return torch.frombuffer(view, dtype=dtype).reshape(entry.shape)


class _Upload:
    """Copies host tensors to one GPU through two page-locked buffers in turn."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = [
            torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)
        ]
        self._read = [
            torch.cuda.Event()  # type: ignore[no-untyped-call]
            for _ in self._buffers
        ]
        self._turn = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor on the GPU, ready for work on the current stream."""
        target = torch.empty_like(tensor, device=self._device)
        if tensor.numel() == 0:
            return target
        current = torch.cuda.current_stream(self._device)
        # The allocator may hand out memory that work queued on the current stream still uses.
        self._stream.wait_stream(current)
        source, goal = _flat_bytes(tensor), _flat_bytes(target)
        for start in range(0, source.numel(), _STAGING_BYTES):
            self._copy_part(
                goal[start : start + _STAGING_BYTES], source[start : start + _STAGING_BYTES]
            )
        current.wait_stream(self._stream)
        target.record_stream(self._stream)
        return target

    def _copy_part(self, target: torch.Tensor, source: torch.Tensor) -> None:
        turn, self._turn = self._turn, (self._turn + 1) % len(self._buffers)
        self._read[turn].synchronize()  # until the GPU has read what the buffer held before
        staged = self._buffers[turn][: source.numel()]
        staged.copy_(source)
        with torch.cuda.stream(self._stream):
            target.copy_(staged, non_blocking=True)
            self._read[turn].record(self._stream)


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
