"""A fetched model as a folder that Hugging Face's own reader takes for the original."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from paraserve_backend.engines.model_folder import link_model
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.weights.checkpoint.fetch_plan import (
    coalesce,
    has_whole_objects,
    model_tensors,
    plan_fetch,
    whole_objects,
)
from paraserve_backend.weights.checkpoint.index import read_index
from paraserve_backend.weights.sources.open import open_source
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.reader import TierReader
from tests.support.checkpoints import (
    land,
    make_index,
    make_plan,
    write_checkpoint,
)
from tests.support.limits import HANG_S


def fetched(tier: Tier, fetch_id: str) -> TierReader:
    return TierReader.open(tier.directory, fetch_id)


def tensors_in(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                found[name] = file.get_tensor(name).tobytes()
    return found


@pytest.mark.parametrize("shards", [1, 3])
def test_the_folder_reads_as_the_checkpoint_does(tmp_path: Path, tier: Tier, shards: int) -> None:
    model = write_checkpoint(tmp_path / "checkpoint", shards=shards)
    index = read_index(open_source(str(model)))
    plan = plan_fetch(index, whole_objects(index), fetch_id="whole")
    land(tier.begin(plan), model)
    folder = link_model(fetched(tier, "whole"), timeout_s=HANG_S)
    assert tensors_in(folder) == tensors_in(model)
    for key in ("config.json", "tokenizer.json"):
        assert (folder / key).read_bytes() == (model / key).read_bytes()
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map == {name: entry.object_key for name, entry in index.tensors.items()}


def test_nothing_is_copied_and_all_goes_with_the_fetch(tier: Tier, model: Path) -> None:
    index = read_index(open_source(str(model)))
    fetch = tier.begin(plan_fetch(index, whole_objects(index), fetch_id="whole"))
    land(fetch, model)
    fetch.finish()
    used_bytes = tier.used_bytes
    folder = link_model(fetched(tier, "whole"), timeout_s=HANG_S)
    assert tier.used_bytes == used_bytes
    assert all(path.is_symlink() for path in folder.glob("*.safetensors"))
    # A process that starts again finds the old links.
    assert link_model(fetched(tier, "whole"), timeout_s=HANG_S) == folder
    tier.release("whole")
    assert os.listdir(tier.directory / "fetches") == os.listdir(tier.directory / "objects") == []


def test_bytes_of_a_stage_that_is_here_already_count_as_landed(tier: Tier, model: Path) -> None:
    stage = tier.begin(make_plan(model, fetch_id="stage", layers=(0, 2)), part_bytes=1024)
    land(stage, model)
    index = read_index(open_source(str(model)))
    plan = plan_fetch(index, whole_objects(index), fetch_id="whole")
    whole = tier.begin(plan, part_bytes=1024)
    assert 0 < len(whole.missing_parts()) < len(whole.parts)
    land(whole, model)
    assert tensors_in(link_model(fetched(tier, "whole"), timeout_s=HANG_S)) == tensors_in(model)


def test_a_fetch_with_holes_is_refused(tier: Tier, model: Path) -> None:
    land(tier.begin(make_plan(model)), model)
    with pytest.raises(InvalidRequest, match="tensors alone"):
        link_model(fetched(tier, "fetch-1"), timeout_s=HANG_S)


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=12), objects=st.integers(1, 4))
def test_whole_objects_have_every_byte_once(sizes: list[int], objects: int) -> None:
    named = {f"t{number}": size for number, size in enumerate(sizes)}
    index = make_index(named, objects=min(objects, len(sizes)))
    entries = whole_objects(index)
    covered = {(each.object_key, each.start, each.end) for each in coalesce(entries)}
    assert covered == {(stored.key, 0, stored.size_bytes) for stored in index.objects}
    plan = plan_fetch(index, entries, fetch_id="whole")
    assert has_whole_objects(plan)
    assert {each.name for each in model_tensors(plan)} == index.tensors.keys()
