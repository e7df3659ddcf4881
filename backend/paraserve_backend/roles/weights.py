"""Opens a model's weights and small files: a fetch that the agent runs, or one that is begun here.

A standalone model fetches into a tier of its own with the same code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from paraserve_backend.architectures.spec import ModelSpec
from paraserve_backend.errors import InvalidRequest, NotFound
from paraserve_backend.protocol.parameters import WeightsConfig
from paraserve_backend.protocol.run_dir import RunDir, TierDir
from paraserve_backend.telemetry.spans import SpanFile
from paraserve_backend.weights.checkpoint.model import spec_of_fetched
from paraserve_backend.weights.tiers.reader import TierReader

#: A fetch has its own, shorter limits; this one only ends a wait for a writer that vanished.
_TIMEOUT_S = 3600.0


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
    config, generation = fetched.json("config.json"), fetched.json("generation_config.json")
    return spec_of_fetched(config, generation, fetched.reader.plan)


def _open(tier: TierDir, fetch_id: str, close: Callable[[], None]) -> Fetched:
    return Fetched(
        reader=TierReader.open(tier.path, fetch_id),
        spans=SpanFile(tier.spans(fetch_id)),
        close=close,
    )


def _nothing() -> None:
    pass


def _fetch_here(config: WeightsConfig, uri: str, *, whole_objects: bool) -> Fetched:
    # Only a standalone model needs it; boto3 alone takes 0.3 s to import.
    from paraserve_backend.roles.standalone_fetch import plan_standalone

    own = plan_standalone(config, uri, whole_objects=whole_objects)
    with ExitStack() as stack:
        stack.callback(own.close)
        fetched = _open(own.tier_dir, own.fetch_id, own.close)
        own.start()
        stack.pop_all()
    return fetched
