"""What a run asks about the task that it trains."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mnv2_fused import weights
from mnv2_fused.data.datasets import Data, Pictures
from mnv2_fused.trainer.config import Config, TrainError
from mnv2_fused.weights import Convention

State = dict[str, torch.Tensor]


class Task:
    """A network, its data, its loss and its figures. A task keeps nothing between calls.

    Attributes:
        name: value of `Config.task`.
        title: the network in words.
        accuracy: whether `loss` counts correct answers.
        headline: figures of `validate` to print after an epoch, by their names.
        without: fields of `Config` that mean nothing here.
        command: of the command line, which uses the trained network.
    """

    name: str
    title: str
    accuracy = False
    headline: dict[str, str]
    without: tuple[str, ...] = ()
    command: str

    def defaults(self, config: Config) -> dict[str, Any]:
        """Values of the fields of `config` that are None."""
        raise NotImplementedError

    def load(self, name: str, config: Config, convention: Convention) -> Data:
        """The data. Raises datasets.DataError."""
        raise NotImplementedError

    def convention(self, config: Config) -> Convention:
        """How images are prepared."""
        return weights.at_resolution(weights.CONVENTIONS[config.convention], config.resolution)

    def check(self, data: Data, name: str, config: Config) -> None:
        """Raises TrainError for data that cannot be trained on."""

    def build(self, config: Config, classes: int) -> nn.Module:
        """The network with its initial weights."""
        raise NotImplementedError

    def read_start(self, config: Config) -> tuple[State, Config]:
        """The weights to start from, and `config` with the network and the preprocessing that they bring.

        Raises:
            weights.WeightsError: no weights of this network.
            TrainError: an option contradicts them.
        """
        raise NotImplementedError

    def merge(self, start: State, own: State) -> tuple[State, set[str]]:
        """`start` with the values of `own` for layers that it lacks or that have other classes, and their keys."""
        raise NotImplementedError

    def collate(self, items: list[tuple]) -> tuple[Any, Any]:
        """A batch of the data's items: what the network takes, and the truth, with an entry an image."""
        raise NotImplementedError

    def loss(self, model: nn.Module, x: Any, target: Any, config: Config) -> tuple[torch.Tensor, int]:
        """The mean loss of a batch in training mode, and how many answers are correct (0 without `accuracy`)."""
        raise NotImplementedError

    def validate(self, model: nn.Module, data: Pictures, batches: Iterable[tuple[Any, Any]]) -> dict[str, float | None]:
        """Figures of the network in eval mode for the log. `validation_loss`, if it is one of them, must be finite."""
        raise NotImplementedError

    def decay(self, share: float) -> float:
        """The learning rate of `sgd` after a share of the steps (0 to 1), relative to the highest: a cosine to 0."""
        return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    def facts(self, config: Config, classes: int) -> dict[str, object]:
        """What files of weights state beside them, for the functions that build the network."""
        return {"convention": config.convention, "resolution": config.resolution}


def contradiction(option: str, given: object, found: object) -> TrainError:
    """The error for an option that is not as in the weights."""
    return TrainError(f"{option} {given} contradicts --weights, which has {found}")
