"""Reads KV blocks out of one replica's cache and writes them into another's, during a hand-over.

The two may be cut into stages differently: blocks are named by their place in the sequence and by
their layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from paraserve_backend.architectures.spec import LayerRange
from paraserve_backend.engines.native.model.kv_cache import KvCache
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.forward import Export
from paraserve_backend.protocol.hand_over import KvBlocks, SendMessage


class KvExporter:
    """Sends what forward passes ask for; used by the thread that runs them."""

    def __init__(self, cache: KvCache, layers: LayerRange, send: SendMessage) -> None:
        self._storage = cache.storage
        self._layers = layers
        self._send = send

    def send(self, exports: Iterable[Export]) -> None:
        """Send the blocks as they are now."""
        for export in exports:
            self._send(export.address, self._message(export))

    def _message(self, export: Export) -> KvBlocks:
        blocks = torch.tensor(export.blocks, device=self._storage.device)
        copied: npt.NDArray[np.uint8] = (
            self._storage.index_select(2, blocks).view(torch.uint8).cpu().numpy()
        )
        return KvBlocks(
            ticket=export.ticket,
            layer_start=self._layers.start,
            layer_end=self._layers.end,
            first=export.first,
            num_blocks=len(export.blocks),
            payload=copied.data.cast("B"),
        )


class KvImporter:
    """Writes received blocks into the cache of an instance that holds all layers."""

    def __init__(self, cache: KvCache) -> None:
        self._storage = cache.storage

    def write(self, message: KvBlocks, blocks: Sequence[int]) -> None:
        """Put the message's blocks into `blocks`, which no forward pass uses yet.

        Raises:
            InvalidRequest: the two caches differ in their layers or shapes.
        """
        layers, keys_and_values, _, *block_shape = self._storage.shape
        if not 0 <= message.layer_start < message.layer_end <= layers:
            raise InvalidRequest("KV blocks came for layers this model does not have.")
        shape = (
            message.layer_end - message.layer_start,
            keys_and_values,
            message.num_blocks,
            *block_shape,
        )
        size_bytes = math.prod(shape) * self._storage.element_size()
        if len(message.payload) != size_bytes or message.num_blocks != len(blocks):
            raise InvalidRequest("KV blocks came from a cache of another shape.")
        # torch has no read-only tensors and warns; frames are writable.
        received = torch.frombuffer(message.payload, dtype=self._storage.dtype)
        own_layers = self._storage[message.layer_start : message.layer_end]
        own_layers.index_copy_(
            2,
            torch.tensor(blocks, device=self._storage.device),
            received.view(shape).to(self._storage.device),
        )
