"""A whole checkpoint in a host-memory tier, as an agent's fetch leaves it."""

from __future__ import annotations

import threading
from pathlib import Path

from paraserve_backend.architectures.registry import model_spec
from paraserve_backend.architectures.spec import LayerRange
from paraserve_backend.weights.checkpoint.fetch_plan import plan_fetch
from paraserve_backend.weights.checkpoint.index import read_index
from paraserve_backend.weights.checkpoint.stages import stage_tensors
from paraserve_backend.weights.fetching.fetch import fetch
from paraserve_backend.weights.sources.open import open_source
from paraserve_backend.weights.tiers.memory import Tier


def fetch_whole(model: Path, tier: Tier, fetch_id: str) -> None:
    """Fetch all layers of the checkpoint in the folder `model` into `tier`."""
    source = open_source(str(model))
    index = read_index(source)
    spec = model_spec(index.config)
    layers = LayerRange(start=0, end=spec.num_layers, total=spec.num_layers)
    tensors = stage_tensors(index, spec.names, tied=spec.tie_word_embeddings, layers=layers)
    plan = plan_fetch(index, tensors, fetch_id=fetch_id)
    fetch(tier.begin(plan), source, tier, timeout_s=600, cancel=threading.Event())
