"""Batch norms as those of a trained network, for networks that are not trained."""

from __future__ import annotations

import torch
from torch import nn


def randomize_batch_norm(model: nn.Module, seed: int = 0) -> None:
    """Gives every batch norm of `model` random statistics, scales and biases, the same for equal seeds.

    With the statistics of a new model the outputs are so small that a network returning zeros looks right. The scales
    keep the size of activations from block to block.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator).mul_(high - low).add_(low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(uniform(module.running_mean, -0.2, 0.2))
                module.running_var.copy_(uniform(module.running_var, 0.2, 0.6))
                module.weight.copy_(uniform(module.weight, 0.6, 1.4))
                module.bias.copy_(uniform(module.bias, -0.3, 0.7))
