from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from paraserve_backend.engines.native.model.weights import WeightLoader
from paraserve_backend.errors import NotFound, SourceUnavailable, UnsupportedModel
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan, plan_fetch
from paraserve_backend.weights.checkpoint.index import read_index
from paraserve_backend.weights.sources.open import open_source
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.reader import TierReader
from tests.support.checkpoints import (
    header_of,
    land,
    make_plan,
    safetensors_file,
)

CPU = torch.device("cpu")
DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


def plan_of(folder: Path) -> FetchPlan:
    index = read_index(open_source(str(folder)))
    return plan_fetch(index, tuple(index.tensors.values()), fetch_id="fetch-1")


def landed(tier: Tier, folder: Path) -> TierReader:
    land(tier.begin(plan_of(folder)), folder)
    return TierReader.open(tier.directory, "fetch-1")


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Compare as bytes: random ones may be NaN, and not every type has an equality."""
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_is_what_the_safetensors_library_reads(
    tier: Tier, tmp_path: Path, dtype: torch.dtype
) -> None:
    values = torch.arange(24).reshape(2, 3, 4).to(dtype)
    folder = write_tensors(tmp_path / "one", {"x": values, "scalar": values[1, 1, 1].clone()})
    loader = WeightLoader(landed(tier, folder), CPU)
    for name, expected in load_file(folder / "model.safetensors").items():
        tensor = loader.get(name)
        assert tensor.dtype == expected.dtype
        assert tensor.shape == expected.shape
        assert same_bytes(tensor, expected)


def test_a_cpu_tensor_is_the_tiers_memory_and_not_a_copy(tier: Tier, model: Path) -> None:
    reader = landed(tier, model)
    loader = WeightLoader(reader, CPU)
    for tensor in reader.plan.tensors:
        assert loader.get(tensor.name).data_ptr() == address_of(reader.view(tensor.name))


def test_a_tensor_at_an_odd_offset_is_copied_to_an_aligned_one(tier: Tier, tmp_path: Path) -> None:
    header = json.dumps(header_of({"a": (3,)})).encode()
    header += b" " * (-len(header) % 4 + 1)
    content = safetensors_file(header, b"\0\0\x80?" * 3)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{}")
    (tmp_path / "odd" / "model.safetensors").write_bytes(content)
    tensor = WeightLoader(landed(tier, tmp_path / "odd"), CPU).get("a")
    assert tensor.tolist() == [1.0, 1.0, 1.0]
    assert tensor.data_ptr() % 4 == 0


def test_a_tensor_without_elements_keeps_its_shape(tier: Tier, tmp_path: Path) -> None:
    folder = write_tensors(tmp_path / "m", {"x": torch.empty(0, 3), "y": torch.ones(1)})
    assert WeightLoader(landed(tier, folder), CPU).get("x").shape == (0, 3)


def test_tensors_outlive_their_loader_and_their_fetch(tier: Tier, model: Path) -> None:
    loader = WeightLoader(landed(tier, model), CPU)
    shards = [load_file(path) for path in model.glob("*.safetensors")]
    expected = {name: tensor for shard in shards for name, tensor in shard.items()}
    tensors = {name: loader.get(name) for name in expected}
    del loader
    tier.fetches()[0].finish()
    tier.release("fetch-1")
    assert all(same_bytes(tensors[name], expected[name]) for name in expected)


def test_a_tensor_that_will_not_come_raises_why(tier: Tier, model: Path) -> None:
    fetch = tier.begin(make_plan(model))
    loader = WeightLoader(TierReader.open(tier.directory, "fetch-1"), CPU)
    fetch.fail(SourceUnavailable("the store is down"))
    with pytest.raises(SourceUnavailable, match="the store is down"):
        loader.get("lm_head.weight")
    with pytest.raises(NotFound, match="no tensor other"):
        loader.get("other")


def test_a_type_that_torch_cannot_compute_with_is_unsupported(tier: Tier, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    content = safetensors_file(header_of({"a": (2,)}, "U16"), b"1234")
    (tmp_path / "m" / "model.safetensors").write_bytes(content)
    with pytest.raises(UnsupportedModel, match="tensor a has data type U16"):
        WeightLoader(landed(tier, tmp_path / "m"), CPU).get("a")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_tensors_larger_than_the_staging_buffers_arrive_whole_on_a_gpu(
    tier: Tier, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    large = torch.randint(-9, 9, (40_000_003,), generator=generator).to(torch.float16)
    tensors = {"large": large, "small": torch.arange(7.0), "none": torch.empty(0, 2)}
    reader = landed(tier, write_tensors(tmp_path / "m", tensors))
    loader = WeightLoader(reader, torch.device("cuda"))
    for name, expected in tensors.items():
        assert torch.equal(loader.get(name).cpu(), expected)
