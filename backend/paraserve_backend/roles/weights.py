"""Opens a model's weights and small files: a fetch that the agent runs, or one that is begun here.

A standalone model fetches into a tier of its own with the same code.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paraserve_backend.architectures.registry import model_spec
from paraserve_backend.architectures.spec import LayerRange, ModelSpec
from paraserve_backend.errors import InvalidRequest, NotFound, ParaServeError
from paraserve_backend.protocol.names import fetch_id
from paraserve_backend.protocol.parameters import STANDALONE, WeightsConfig
from paraserve_backend.protocol.run_dir import RunDir, TierDir
from paraserve_backend.telemetry.spans import SpanFile
from paraserve_backend.weights.tiers.reader import TierReader

logger = logging.getLogger(__name__)
#: A fetch has its own, shorter limits; this one only ends a wait for a writer that vanished.
_TIMEOUT_S = 3600.0
_HOST_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A fetch that may still be running."""

    reader: TierReader
    #: Phases of the load, for the cold start's timeline.
    spans: SpanFile
    close: Callable[[], None]

    def file(self, key: str) -> bytes:
        return self.reader.read_file(key, timeout_s=_TIMEOUT_S)

    def json(self, key: str) -> dict[str, Any]:
        """Return a small JSON file, `{}` where the model has none."""
        try:
            parsed = json.loads(self.file(key))
        except NotFound:
            return {}
        return parsed if isinstance(parsed, dict) else {}


def open_weights(config: WeightsConfig, *, whole_objects: bool = False) -> Fetched:
    """Open the fetch the agent has begun, or begin one here.

    Args:
        config: where they are.
        whole_objects: what is fetched here comes with the files' headers; an agent's fetch has
            what the scheduler has planned.

    Raises:
        ParaServeError: there is no such fetch, or the source cannot be read.
    """
    if config.source is not None:
        return _fetch_here(config, config.source, whole_objects=whole_objects)
    if config.run_dir is None or config.fetch_id is None:
        raise InvalidRequest("config.pbtxt names no weights: set parameter 'source'.")
    return _open(RunDir(config.run_dir).tier, config.fetch_id, close=_nothing)


def read_spec(fetched: Fetched) -> ModelSpec:
    return model_spec(fetched.json("config.json"), fetched.json("generation_config.json"))


def _open(tier: TierDir, fetch_id: str, close: Callable[[], None]) -> Fetched:
    return Fetched(
        reader=TierReader.open(tier.path, fetch_id),
        spans=SpanFile(tier.spans(fetch_id)),
        close=close,
    )


def _nothing() -> None:
    pass


def _fetch_here(config: WeightsConfig, uri: str, *, whole_objects: bool) -> Fetched:
    # Only a standalone model needs these; boto3 alone takes 0.3 s to import.
    from paraserve_backend.weights.checkpoint import fetch_plan
    from paraserve_backend.weights.checkpoint.fetch_plan import plan_fetch
    from paraserve_backend.weights.checkpoint.index import read_index
    from paraserve_backend.weights.checkpoint.stages import stage_tensors
    from paraserve_backend.weights.fetching.fetch import fetch
    from paraserve_backend.weights.sources.open import open_source
    from paraserve_backend.weights.tiers.memory import Tier

    source = open_source(uri, endpoint_url=config.endpoint_url, region=config.region)
    index = read_index(source)
    spec = model_spec(index.config)
    layers = LayerRange(start=0, end=spec.num_layers, total=spec.num_layers)
    tensors = (
        fetch_plan.whole_objects(index)
        if whole_objects
        else stage_tensors(index, spec.names, tied=spec.tie_word_embeddings, layers=layers)
    )
    plan = plan_fetch(index, tensors, fetch_id=fetch_id(STANDALONE, os.getpid()))
    folder = tempfile.mkdtemp(prefix=f"paraserve-standalone-{os.getpid()}-", dir=_HOST_MEMORY)
    run_dir = RunDir(Path(folder))
    tier = Tier.open(run_dir.tier.path)
    writer = tier.begin(plan)
    cancel = threading.Event()

    def run() -> None:
        try:
            fetch(writer, source, tier, timeout_s=_TIMEOUT_S, cancel=cancel)
        except ParaServeError as error:
            # The reader raises it again where the weights are waited for.
            logger.error("the fetch of %s failed: %s", uri, error)

    thread = threading.Thread(target=run, name="fetch", daemon=True)
    thread.start()

    def close() -> None:
        cancel.set()
        thread.join()
        shutil.rmtree(run_dir.path, ignore_errors=True)

    return _open(run_dir.tier, plan.fetch_id, close)
