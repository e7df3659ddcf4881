from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.architectures.registry import model_spec
from paraserve_backend.architectures.spec import DTYPE_BYTES, Dtype, LayerRange, ModelSpec
from paraserve_backend.architectures.tensors import kv_bytes_per_token
from paraserve_backend.engines.native.model.kv_cache import KvCache

KV_HEADS, HEAD_DIM = 2, 4


def make_spec(dtype: Dtype = Dtype.FLOAT32) -> ModelSpec:
    return model_spec(
        {
            "architectures": ["LlamaForCausalLM"],
            "dtype": dtype.value,
            "vocab_size": 8,
            "hidden_size": 16,
            "intermediate_size": 8,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": KV_HEADS,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 64,
        }
    )


def make_cache(num_blocks: int = 5, block_size: int = 3) -> KvCache:
    layers = LayerRange(start=2, end=4, total=6)
    return KvCache(make_spec(), layers, num_blocks=num_blocks, block_size=block_size)


@given(order=st.permutations(range(5)), length=st.integers(1, 15))
def test_what_is_written_through_slots_is_read_through_the_block_table(
    order: list[int], length: int
) -> None:
    cache = make_cache()
    layer = cache.layer(1)
    keys = torch.randn(length, KV_HEADS, HEAD_DIM)
    slots = [order[position // 3] * 3 + position % 3 for position in range(length)]
    layer.write(torch.tensor(slots), keys, -keys)
    read_keys, read_values = layer.gather(torch.tensor([order]))
    assert read_keys.shape == (1, KV_HEADS, 15, HEAD_DIM)
    torch.testing.assert_close(read_keys[0, :, :length].transpose(0, 1), keys, rtol=0, atol=0)
    torch.testing.assert_close(read_values[0, :, :length].transpose(0, 1), -keys, rtol=0, atol=0)


def test_a_gather_reads_each_row_through_its_own_table() -> None:
    layer = make_cache().layer(0)
    layer.write(
        torch.arange(15), torch.arange(15.0)[:, None, None].expand(-1, 2, 4), torch.ones(15, 2, 4)
    )
    keys, _ = layer.gather(torch.tensor([[4, 0], [1, 1]]))
    assert keys[0, 0, :, 0].tolist() == [12, 13, 14, 0, 1, 2]
    assert keys[1, 1, :, 3].tolist() == [3, 4, 5, 3, 4, 5]


def test_layers_do_not_share_blocks() -> None:
    cache = make_cache()
    ones = torch.ones(15, KV_HEADS, HEAD_DIM)
    cache.layer(0).write(torch.arange(15), ones, ones)
    assert not cache.layer(1).keys.any()
    assert not cache.layer(1).values.any()


def test_cleared_blocks_hold_zeros_in_every_layer_and_the_others_what_they_held() -> None:
    cache = make_cache()
    cache.storage.fill_(float("nan"))
    cache.clear([1, 3])
    held = cache.storage.isnan().all(dim=(0, 1, 3, 4, 5))
    assert held.tolist() == [True, False, True, False, True]
    assert not cache.storage[:, :, [1, 3]].any()


@pytest.mark.parametrize("dtype", Dtype)
def test_the_cache_takes_the_bytes_that_planning_counts(dtype: Dtype) -> None:
    spec, layers = make_spec(dtype), LayerRange(start=2, end=5, total=6)
    cache = KvCache(spec, layers, num_blocks=7)
    taken = cache.storage.numel() * cache.storage.element_size()
    assert taken == 7 * cache.block_size * kv_bytes_per_token(spec, layers)
    assert kv_bytes_per_token(spec, layers) == 3 * 2 * KV_HEADS * HEAD_DIM * DTYPE_BYTES[dtype]


def test_an_empty_cache_takes_no_memory() -> None:
    spec = make_spec()
    layers = LayerRange(start=0, end=spec.num_layers, total=spec.num_layers)
    before_bytes = resident_bytes()
    cache = KvCache(spec, layers, num_blocks=1 << 18)
    size_bytes = cache.storage.numel() * cache.storage.itemsize
    assert size_bytes > 1 << 30
    assert resident_bytes() - before_bytes < size_bytes // 10


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
