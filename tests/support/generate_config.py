"""Settings of role `generate` for tests: one place to name every field."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from paraserve_backend.protocol.names import EngineName
from paraserve_backend.protocol.parameters import GenerateConfig, KvConfig, WeightsConfig


def weights_from(folder: Path) -> WeightsConfig:
    """Weights that the model fetches itself."""
    return WeightsConfig(
        run_dir=None, fetch_id=None, source=str(folder), endpoint_url=None, region=None
    )


def make_generate_config(weights: WeightsConfig, **changes: Any) -> GenerateConfig:
    """A full instance that stands alone, but for `changes`."""
    config = GenerateConfig(
        deployment="d",
        replica="d.1",
        weights=weights,
        kv=KvConfig(num_blocks=None, block_size=16),
        device="cpu",
        engine=EngineName.PARASERVE,
        forward_model=None,
        max_context=None,
        max_sequences=4,
        max_batch_tokens=64,
        batches_in_flight=1,
        hand_over=None,
    )
    return replace(config, **changes)
