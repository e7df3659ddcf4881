"""A fetched model as a folder in Hugging Face's form, from which external engines load.

The files are links into the node's tier; nothing is copied.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.weights.checkpoint.fetch_plan import (
    FetchPlan,
    has_whole_objects,
    model_tensors,
)
from paraserve_backend.weights.tiers.layout import FILES
from paraserve_backend.weights.tiers.reader import TierReader

_FOLDER = "engine"
_SHARD_MAP = "model.safetensors.index.json"


def link_model(reader: TierReader, *, timeout_s: float) -> Path:
    """Wait until the whole model has landed and return its folder, which goes with the fetch.

    Args:
        reader: of a fetch of `whole_objects`.
        timeout_s: for the next tensor or file to land, not for all.

    Raises:
        InvalidRequest: the fetch leaves holes in the files.
        ParaServeError: the fetch failed.
    """
    if not has_whole_objects(reader.plan):
        raise InvalidRequest(
            f"Fetch {reader.plan.fetch_id} has tensors alone, and this engine reads whole files; "
            "deploy the model again."
        )
    for _ in reader.iter_landed((t.name for t in reader.plan.tensors), timeout_s=timeout_s):
        pass
    folder = reader.folder / _FOLDER
    # Left by a process that died; the agent releases a fetch only when nobody uses it.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for stored in reader.plan.objects:
        (folder / stored.key).symlink_to(reader.object_path(stored.key).absolute())
    for stored in reader.plan.files:
        reader.read_file(stored.key, timeout_s=timeout_s)
        (folder / stored.key).symlink_to((reader.folder / FILES / stored.key).absolute())
    (folder / _SHARD_MAP).write_text(_shard_map(reader.plan), encoding="utf-8")
    return folder


def _shard_map(plan: FetchPlan) -> str:
    weight_map = {tensor.name: tensor.object_key for tensor in model_tensors(plan)}
    return json.dumps({"metadata": {"total_size": plan.total_bytes}, "weight_map": weight_map})
