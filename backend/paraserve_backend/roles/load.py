"""From a running fetch to an engine that is ready to step.

Imports torch, which takes a second: import this module only when the engine is wanted.
"""

from __future__ import annotations

import torch

from paraserve_backend.architectures.spec import LayerRange
from paraserve_backend.engines.native.model.kv_cache import KvCache
from paraserve_backend.engines.native.model.stage import StageEngine, StageModel
from paraserve_backend.engines.native.model.weights import WeightLoader
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.parameters import KvConfig
from paraserve_backend.roles.weights import Fetched, read_spec


def load_engine(fetched: Fetched, layers: LayerRange, kv: KvConfig, device: str) -> StageEngine:
    """Adopt the layers' tensors as they land; returns when the last one is in place.

    Raises:
        ParaServeError: the fetch failed, or the checkpoint does not fit its config.json.
    """
    if kv.num_blocks is None:
        raise InvalidRequest("Parameter 'kv_blocks' is missing from config.pbtxt.")
    spec = read_spec(fetched)
    target = torch.device(device)
    with fetched.spans.span("allocate KV cache"):
        cache = KvCache(
            spec, layers, num_blocks=kv.num_blocks, block_size=kv.block_size, device=target
        )
    with fetched.spans.span("adopt weights"):
        weights = WeightLoader(fetched.reader, target, None)
        return StageEngine(StageModel(spec, layers, weights, cache))
