"""Prepares a device before it has a model, and frees its memory after the model has gone."""

from __future__ import annotations

import torch


def warm_up(device: str) -> None:
    """Start the libraries of the CPU's kernels, or make the GPU's context.

    Call it on a thread that ends: OpenMP keeps threads for each thread that computes, and slows
    all down once there are more of them than processors.
    """
    square = torch.ones(64, 64, device=device)
    torch.matmul(square, square)


def release_memory(device: str) -> None:
    """Give memory that torch keeps for later back to the GPU's driver."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
