"""From gradients to weights: the optimizer, its learning rate, the scale of the loss, and averaged weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnv2_fused._core.geometry import DTYPES
from mnv2_fused.trainer.config import AMP, Config


class Updates:
    """How the weights of `model` change.

    Args:
        model: its trainable parameters are those that are so now.
        config: optimizer, learning rate, `amp` and `ema`.
        decay: the learning rate of `sgd` after a share of the steps behind the warm-up, relative to the highest.
        steps_per_epoch: optimizer steps.

    Attributes:
        optimizer: PyTorch's optimizer.
        scaler: scales the loss of float16, whose gradients are too small otherwise. Does nothing for other dtypes.
        averaged: `model` with the moving average of its weights and statistics; None without `ema`.
    """

    def __init__(self, model: nn.Module, config: Config, decay: Callable[[float], float], steps_per_epoch: int) -> None:
        self._model, self._config, self._decay, self._steps_per_epoch = model, config, decay, steps_per_epoch
        self.optimizer = _optimizer(model, config)
        self.scaler = torch.amp.GradScaler("cpu", enabled=config.amp == "fp16")
        self.averaged: AveragedModel | None = None
        if config.ema is not None:
            self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)

    def lr_factor(self, step: int) -> float:
        """The learning rate of `step`, from 0, as a share of the highest."""
        config = self._config
        if config.optimizer == "rmsprop":
            return 0.98 ** (step // self._steps_per_epoch)
        warmup = config.warmup * self._steps_per_epoch
        if step < warmup:
            return (step + 1) / (warmup + 1)
        decay = max(1, config.epochs * self._steps_per_epoch - warmup)
        return self._decay((step - warmup) / decay)

    def lr(self, step: int) -> float:
        """The learning rate of `step`."""
        return self._config.lr * self.lr_factor(step)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The arithmetic of the forward pass."""
        if self._config.amp is None:
            return contextlib.nullcontext()
        return torch.autocast("cpu", DTYPES[AMP[self._config.amp]])

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of `loss` to those that are there."""
        self.scaler.scale(loss).backward()

    def take(self, step: int, factor: float = 1.0) -> None:
        """Takes `step` with `factor` times the gradients that are there, and clears them. The scaler skips it if they
        overflowed.
        """
        if factor != 1:
            for parameter in self._model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged is not None:
            self.averaged.update_parameters(self._model)


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    common = {"lr": config.lr, "momentum": 0.9, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, **common)
    # The paper names no epsilon; this is the default of the training script that its authors published.
    return torch.optim.RMSprop(parameters, alpha=0.9, eps=1.0, **common)
