"""What a run asks about the task that it trains."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

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
        headline: the `figures` to print after an epoch, by their names.
        without: fields of `Config` that mean nothing here.
        packages: optional modules that `figures` needs, of the extra that has the task's name.
        command: of the command line, which uses the trained network.
    """

    name: str
    title: str
    accuracy = False
    headline: ClassVar[dict[str, str]]
    without: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
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
        if len(data.train) < 2:
            raise TrainError(f"{name}: expected at least two photographs to train on, which batch norm needs, got one")

    def build(self, config: Config, classes: int, state: State | None) -> nn.Module:
        """The network with its initial weights, for the weights `state` to be filled in if there are any."""
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

    def loss(self, model: nn.Module, x: Any, target: Any, config: Config) -> tuple[torch.Tensor, float, int]:
        """The mean loss in training mode of a batch, or of a part of one, and what the mean is over: its weight among
        the means of other parts. Then how many answers are correct (0 without `accuracy`).
        """
        raise NotImplementedError

    def score(self, model: nn.Module, data: Pictures, batches: Iterable[tuple[Any, Any]]) -> Any:
        """What the network answers in eval mode on `batches` of `data`, for `figures`. It can be pickled."""
        raise NotImplementedError

    def figures(self, scores: list[Any], data: Pictures) -> dict[str, float | None]:
        """Figures for the log from what `score` returned in each process, which together saw all images of `data` once.
        `validation_loss`, if it is one of them, must be finite.
        """
        raise NotImplementedError

    def decay(self, share: float) -> float:
        """The learning rate of `sgd` after a share of the steps (0 to 1), relative to the highest: a cosine to 0."""
        return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    def facts(self, config: Config, classes: int) -> dict[str, object]:
        """What files of weights state beside them, for the functions that build the network."""
        return {"convention": config.convention, "resolution": config.resolution}


def read_backbone(config: Config) -> tuple[State, bool] | None:
    """The weights of a classification network if `config.weights` is one, under names below `backbone.`; else None.

    With them comes whether they follow TensorFlow's convention.

    Raises:
        weights.WeightsError: nothing readable there.
    """
    if weights.published_name(config.weights) is None:
        loaded, _ = weights.read(config.weights)
        if "features.0.0.weight" not in weights.named(loaded, config.weights)[0]:
            return None
    start, found = weights.load_state_dict(config.weights)
    state = {f"backbone.{key}": value for key, value in start.items() if key.startswith("features.")}
    return state, found.tf_padding


def with_new_layers(start: State, own: State, predictors: str) -> tuple[State, set[str]]:
    """`start` with the values of `own` for layers that it lacks or that have other classes, and their keys.

    A start with names below `backbone.features` alone lacks all other layers, and its own last ones may have no place
    in the network. In other starts only layers below `predictors` may differ, and only in their shapes.
    """
    if all(key.startswith("backbone.features.") for key in start):
        new = {key for key in own if key not in start and not key.endswith("num_batches_tracked")}
        start = {key: value for key, value in start.items() if key in own}
    else:
        new = {key for key in own if key.startswith(predictors) and key in start and start[key].shape != own[key].shape}
    return {**start, **{key: own[key] for key in new}}, new


def convention_of(config: Config, tf: bool) -> str:
    """The convention that `config` asks for, or else that of the weights."""
    return config.convention or ("tensorflow" if tf else "torchvision")


def contradiction(option: str, given: object, found: object) -> TrainError:
    """The error for an option that is not as in the weights."""
    return TrainError(f"{option} {given} contradicts --weights, which has {found}")
