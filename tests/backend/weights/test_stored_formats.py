"""What earlier versions wrote, byte by byte, is still read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan
from paraserve_backend.weights.checkpoint.index import CheckpointIndex
from paraserve_backend.weights.checkpoint.safetensors import TensorEntry
from paraserve_backend.weights.sources.base import UNKNOWN_STORE, StoredObject, StoreIdentity
from paraserve_backend.weights.tiers.disk_format import Identity
from paraserve_backend.weights.tiers.eviction import CachedObject, Extent
from paraserve_backend.weights.tiers.layout import MANIFEST, Manifest

SOURCE = "s3://b/m"
STORE = StoreIdentity(endpoint="https://s3.amazonaws.com", principal="p")
OBJECT = StoredObject(key="model.safetensors", size_bytes=96, version='"é1"')
FILE = StoredObject(key="config.json", size_bytes=2, version="2-7")
TENSORS = (
    TensorEntry(name="a", dtype="F32", shape=(2, 3), object_key=OBJECT.key, start=64, end=88),
    TensorEntry(name="né", dtype="BF16", shape=(), object_key=OBJECT.key, start=88, end=90),
)
INDEX = CheckpointIndex(
    source_uri=SOURCE,
    config={"x": 1.5, "y": [float("inf")], "z": None},
    files=(FILE,),
    objects=(OBJECT,),
    tensors={tensor.name: tensor for tensor in TENSORS},
    store=STORE,
)
PLAN = FetchPlan(
    fetch_id="m.1.0",
    source_uri=SOURCE,
    objects=(OBJECT,),
    tensors=TENSORS,
    files=(FILE,),
    store=STORE,
)
CACHED = CachedObject(
    store=STORE, source_uri=SOURCE, stored=OBJECT, extents=(Extent(start=0, end=9, used=3),)
)
IDENTITY = Identity(store=STORE, source_uri=SOURCE, stored=OBJECT)

INDEX_BYTES = (
    rb'{"source_uri":"s3://b/m","config":{"x":1.5,"y":[Infinity],"z":null},'
    rb'"files":[{"key":"config.json","size_bytes":2,"version":"2-7"}],'
    rb'"objects":[{"key":"model.safetensors","size_bytes":96,"version":"\"\u00e91\""}],'
    rb'"tensors":[["a","F32",[2,3],"model.safetensors",64,88],'
    rb'["n\u00e9","BF16",[],"model.safetensors",88,90]]}'
)
PLAN_BYTES = (
    rb'{"fetch_id":"m.1.0","source_uri":"s3://b/m",'
    rb'"objects":[{"key":"model.safetensors","size_bytes":96,"version":"\"\u00e91\""}],'
    rb'"tensors":[["a","F32",[2,3],"model.safetensors",64,88],'
    rb'["n\u00e9","BF16",[],"model.safetensors",88,90]],'
    rb'"files":[{"key":"config.json","size_bytes":2,"version":"2-7"}]}'
)
MANIFEST_BYTES = (
    rb'{"part_bytes": 8, "plan": {"fetch_id": "m.1.0", "source_uri": "s3://b/m", '
    rb'"objects": [{"key": "model.safetensors", "size_bytes": 96, "version": "\"\u00e91\""}], '
    rb'"tensors": [["a", "F32", [2, 3], "model.safetensors", 64, 88], '
    rb'["n\u00e9", "BF16", [], "model.safetensors", 88, 90]], '
    rb'"files": [{"key": "config.json", "size_bytes": 2, "version": "2-7"}]}}'
)
CACHED_BYTES = (
    rb'{"source_uri": "s3://b/m", '
    rb'"stored": {"key": "model.safetensors", "size_bytes": 96, "version": "\"\u00e91\""}, '
    rb'"extents": [{"start": 0, "end": 9, "used": 3}]}'
)
IDENTITY_BYTES = (
    rb'{"source_uri": "s3://b/m", '
    rb'"stored": {"key": "model.safetensors", "size_bytes": 96, "version": "\"\u00e91\""}}'
)
STORE_BYTES = rb'"store":{"endpoint":"https://s3.amazonaws.com","principal":"p"}'


def with_store(record: bytes) -> bytes:
    """Return the record as this version writes it."""
    return record.removesuffix(b"}") + b"," + STORE_BYTES + b"}"


MANIFEST_WITH_STORE = with_store(MANIFEST_BYTES.removesuffix(b"}")) + b"}"


def read_manifest(content: bytes, folder: Path) -> Manifest:
    (folder / MANIFEST).write_bytes(content)
    return Manifest.read(folder)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert CheckpointIndex.from_json(with_store(INDEX_BYTES)) == INDEX
    assert FetchPlan.from_json(with_store(PLAN_BYTES)) == PLAN
    assert read_manifest(MANIFEST_WITH_STORE, tmp_path) == Manifest(plan=PLAN, part_bytes=8)
    assert CachedObject.from_json(with_store(CACHED_BYTES)) == CACHED
    folder = tmp_path / IDENTITY.name
    folder.mkdir()
    (folder / "object.json").write_bytes(with_store(IDENTITY_BYTES))
    assert Identity.read(folder) == IDENTITY


def test_what_the_scheduler_stored_before_stores_were_told_apart_is_read_as_of_no_store() -> None:
    assert CheckpointIndex.from_json(INDEX_BYTES) == replace(INDEX, store=UNKNOWN_STORE)
    assert FetchPlan.from_json(PLAN_BYTES) == replace(PLAN, store=UNKNOWN_STORE)


def test_bytes_in_a_tier_that_do_not_say_whose_they_are_are_not_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="store"):
        read_manifest(MANIFEST_BYTES, tmp_path)
    with pytest.raises(ValueError, match="store"):
        CachedObject.from_json(CACHED_BYTES)
    folder = tmp_path / IDENTITY.name
    folder.mkdir()
    (folder / "object.json").write_bytes(IDENTITY_BYTES)
    assert Identity.read(folder) is None


@pytest.mark.parametrize(
    ("written", "before"),
    [
        (INDEX.to_json, with_store(INDEX_BYTES)),
        (PLAN.to_json, with_store(PLAN_BYTES)),
        (Manifest(plan=PLAN, part_bytes=8).to_json, MANIFEST_WITH_STORE),
        (CACHED.to_json, with_store(CACHED_BYTES[:-1] + b', "pieces": []}')),
    ],
)
def test_what_is_written_says_the_same_to_an_earlier_version(
    written: Callable[[], bytes], before: bytes
) -> None:
    # What has been added since is not known there, and not read.
    assert without_additions(json.loads(written())) == json.loads(before)


def without_additions(value: Any) -> Any:
    """Leave out `dtype`, of indexes and plans."""
    if not isinstance(value, dict):
        return value
    return {key: without_additions(item) for key, item in value.items() if key != "dtype"}


def test_the_type_of_the_weights_is_written_and_read() -> None:
    assert CheckpointIndex.from_json(replace(INDEX, dtype="BF16").to_json()).dtype == "BF16"
    assert FetchPlan.from_json(replace(PLAN, dtype="BF16").to_json()).dtype == "BF16"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (rb"64,88", rb'"64",88'),
        (rb"64,88", rb"64.5,88"),
        (rb"64,88", rb"true,88"),
        (rb"64,88", rb"64"),
        (rb"64,88", rb"64,88,90"),
        (rb'"size_bytes":96', rb'"size_bytes":null'),
        (rb'"key":"model.safetensors",', rb""),
    ],
)
def test_a_value_of_another_type_is_no_plan(right: bytes, wrong: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not a fetch plan of this version"):
        FetchPlan.from_json(PLAN_BYTES.replace(right, wrong))
