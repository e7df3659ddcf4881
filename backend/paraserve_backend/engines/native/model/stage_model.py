"""One pipeline stage at work: a model over its layers, with sampling where it ends the model."""

from __future__ import annotations

import torch

from paraserve_backend.engines.native.model.sampler import sample
from paraserve_backend.engines.native.model.stage import StageModel
from paraserve_backend.protocol.forward import ForwardBatch, ForwardResult


class StageEngine:
    def __init__(self, model: StageModel) -> None:
        self.model = model

    def step(self, batch: ForwardBatch, inputs: torch.Tensor) -> torch.Tensor | ForwardResult:
        """One forward pass; arguments and errors are those of `StageModel.forward`.

        Returns:
            Hidden states for the next stage, or on the last stage the chosen tokens.
        """
        outputs = self.model.forward(batch, inputs)
        if not self.model.layers.is_last:
            return outputs
        sampled = [(row, row.sampling) for row in batch.rows if row.sampling is not None]
        return sample(
            outputs,
            [sampling for _, sampling in sampled],
            [row.start + row.num_tokens for row, _ in sampled],
        )
