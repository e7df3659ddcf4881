"""The paged KV cache of one stage: keys and values of its layers, in blocks of positions.

It only stores and reads. The generate loop decides which block belongs to which sequence, and sends
the block tables with each batch. Positions after a sequence's end are kept at zero, because
attention computes with them before it masks them, and masking does not remove a NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from paraserve_backend.architectures.spec import LayerRange, ModelSpec
from paraserve_backend.engines.native.model.tensors import TORCH_DTYPE

#: Positions per block, unless the deployment says otherwise.
BLOCK_SIZE = 16


class LayerCache:
    """One layer's part of the cache, `[blocks, block_size, kv_heads, head_dim]` each."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = keys
        self.values = values
        self._keys_by_slot = keys.flatten(0, 1)
        self._values_by_slot = values.flatten(0, 1)

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store `[tokens, kv_heads, head_dim]` at `slots`, each block * block_size + offset."""
        self._keys_by_slot.index_copy_(0, slots, keys)
        self._values_by_slot.index_copy_(0, slots, values)

    def gather(self, block_tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `[rows, blocks]`, as `[rows, kv_heads, blocks * block_size, dim]`."""
        return _gather(self.keys, block_tables), _gather(self.values, block_tables)


class KvCache:
    """`num_blocks` blocks of `block_size` positions for every layer of a stage."""

    def __init__(
        self,
        spec: ModelSpec,
        layers: LayerRange,
        *,
        num_blocks: int,
        block_size: int = BLOCK_SIZE,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.storage = _zeros(
            (len(layers), 2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim),
            TORCH_DTYPE[spec.dtype],
            torch.device(device),
        )

    @property
    def device(self) -> torch.device:
        return self.storage.device

    def clear(self, blocks: Iterable[int]) -> None:
        """Forget what `blocks` hold in every layer, before their next owner begins them."""
        for block in blocks:
            self.storage[:, :, block].zero_()

    def layer(self, index: int) -> LayerCache:
        """The cache of the stage's `index`-th layer, counted from the stage's own first."""
        return LayerCache(self.storage[index, 0], self.storage[index, 1])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # The kernel's own zero pages: nothing is written, and no memory is taken, before it is used.
    pages = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)


def _gather(blocks: torch.Tensor, block_tables: torch.Tensor) -> torch.Tensor:
    rows = block_tables.shape[0]
    chosen = blocks.index_select(0, block_tables.flatten())
    return chosen.view(rows, -1, *blocks.shape[2:]).transpose(1, 2)
