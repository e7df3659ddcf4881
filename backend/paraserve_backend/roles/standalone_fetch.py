"""The fetch of a standalone model: a tier of its own, and the thread that fills it.

Only a standalone model needs this module's imports, and boto3 alone takes 0.3 s: import it only
there.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path

from paraserve_backend.architectures.spec import LayerRange
from paraserve_backend.errors import ParaServeError
from paraserve_backend.protocol.names import fetch_id
from paraserve_backend.protocol.parameters import STANDALONE, WeightsConfig
from paraserve_backend.protocol.run_dir import RunDir, TierDir
from paraserve_backend.weights.checkpoint import fetch_plan
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan, plan_fetch
from paraserve_backend.weights.checkpoint.model import read_model, spec_of
from paraserve_backend.weights.checkpoint.stages import stage_tensors
from paraserve_backend.weights.fetching.fetch import fetch
from paraserve_backend.weights.sources.base import Source
from paraserve_backend.weights.sources.open import open_source
from paraserve_backend.weights.tiers.memory import Tier

logger = logging.getLogger(__name__)
#: Only ends a fetch that would never end: nobody else waits for this process's start.
_TIMEOUT_S = 3600.0
_HOST_MEMORY = Path("/dev/shm")


class StandaloneFetch:
    """Owns a fetch of this process, its folder in host memory and its thread.

    `start` begins to fetch, `close` ends that and frees the memory. A failure is logged here, and
    readers raise it where they wait for the weights.
    """

    def __init__(self, plan: FetchPlan, source: Source) -> None:
        """Make room for the fetch; raises what `Tier.begin` does."""
        self.fetch_id = plan.fetch_id
        prefix = f"paraserve-standalone-{os.getpid()}-"
        self._run_dir = RunDir(Path(tempfile.mkdtemp(prefix=prefix, dir=_HOST_MEMORY)))
        try:
            self._tier = Tier.open(self.tier_dir.path)
            self._writer = self._tier.begin(plan)
        except BaseException:
            self._remove_folder()
            raise
        self._source = source
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fetch", daemon=True)

    @property
    def tier_dir(self) -> TierDir:
        return self._run_dir.tier

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the fetch and free its memory; only once no reader uses it."""
        self._cancelled.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._tier.close()
        self._remove_folder()

    def _run(self) -> None:
        try:
            fetch(
                self._writer,
                self._source,
                self._tier,
                timeout_s=_TIMEOUT_S,
                cancel=self._cancelled,
            )
        except ParaServeError as error:
            logger.error("the fetch of %s failed: %s", self._source.uri, error)
        except Exception:  # a bug: readers are told that the log says why
            logger.exception("the fetch of %s failed", self._source.uri)

    def _remove_folder(self) -> None:
        shutil.rmtree(self._run_dir.path, ignore_errors=True)


def plan_standalone(config: WeightsConfig, uri: str, *, whole_objects: bool) -> StandaloneFetch:
    """Plan a fetch of a whole model and make room for it.

    Raises:
        ParaServeError: the source cannot be read, or there is no room.
    """
    source = open_source(uri, endpoint_url=config.endpoint_url, region=config.region)
    index = read_model(source)
    spec = spec_of(index)
    layers = LayerRange(start=0, end=spec.num_layers, total=spec.num_layers)
    tensors = (
        fetch_plan.whole_objects(index)
        if whole_objects
        else stage_tensors(index, spec.names, tied=spec.tie_word_embeddings, layers=layers)
    )
    plan = plan_fetch(index, tensors, fetch_id=fetch_id(STANDALONE, os.getpid()))
    return StandaloneFetch(plan, source)
