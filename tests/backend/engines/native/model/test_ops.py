from __future__ import annotations

import pytest
import torch

from paraserve_backend.engines.native.model import ops
from paraserve_backend.engines.native.model.ops import Parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_one_row_is_projected_as_it_is_among_others(dtype: torch.dtype, has_bias: bool) -> None:
    torch.manual_seed(0)
    bias = torch.randn(96, dtype=dtype) if has_bias else None
    module = Parameters(weight=torch.randn(96, 128, dtype=dtype) / 8, bias=bias)
    rows = torch.randn(3, 128, dtype=dtype)
    torch.testing.assert_close(module.project(rows[:1]), module.project(rows)[:1])


@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_of_bf16_goes_without_onednn_where_it_has_no_tiles(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, has_amx: bool
) -> None:
    monkeypatch.setattr(ops, "HAS_AMX", has_amx)
    used: list[object] = []
    multiply = torch.mv

    def watched(weight: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        used.append(torch.backends.mkldnn.enabled)
        return multiply(weight, row)

    monkeypatch.setattr(torch, "mv", watched)
    Parameters(weight=torch.randn(96, 128, dtype=dtype)).project(torch.randn(1, 128, dtype=dtype))
    assert used == [dtype is torch.float32 or has_amx]


def test_onednn_is_left_as_it_was_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "HAS_AMX", False)
    module = Parameters(weight=torch.randn(96, 128).bfloat16())
    assert torch.backends.mkldnn.enabled
    module.project(torch.randn(1, 128).bfloat16())
    with pytest.raises(RuntimeError):
        module.project(torch.randn(1, 127).bfloat16())
    assert torch.backends.mkldnn.enabled
