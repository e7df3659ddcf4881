"""Builds a stage's engine from a fetch that may still be running.

Imports torch, which takes a second: import this module only when the engine is needed.
"""

from __future__ import annotations

import torch

from paraserve_backend.architectures.spec import LayerRange, ModelSpec
from paraserve_backend.engines.native.model.kv_cache import KvCache
from paraserve_backend.engines.native.model.stage import StageEngine, StageModel
from paraserve_backend.engines.native.model.weights import WeightLoader
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.parameters import KvConfig
from paraserve_backend.telemetry.spans import SpanFile, SpanName
from paraserve_backend.weights.tiers.reader import TierReader


def load_engine(
    reader: TierReader,
    spans: SpanFile,
    *,
    spec: ModelSpec,
    layers: LayerRange,
    kv: KvConfig,
    device: str,
) -> StageEngine:
    """Adopt the layers' tensors as they land; returns when the last one is in place.

    Args:
        reader: the fetch, which may still be running.
        spans: get the phases of the load.
        spec: the whole model's.
        layers: those that this engine computes.
        kv: `num_blocks` must be known.
        device: "cpu" or "cuda:<index>".

    Raises:
        ParaServeError: the fetch failed, or the checkpoint does not fit its config.json.
    """
    if kv.num_blocks is None:
        raise InvalidRequest("Parameter 'kv_blocks' is missing from config.pbtxt.")
    target = torch.device(device)
    with spans.span(SpanName.ALLOCATE_KV_CACHE):
        cache = KvCache(
            spec, layers, num_blocks=kv.num_blocks, block_size=kv.block_size, device=target
        )
    with spans.span(SpanName.ADOPT_WEIGHTS):
        weights = WeightLoader(reader, target)
        return StageEngine(StageModel(spec, layers, weights, cache))
