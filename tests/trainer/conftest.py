"""A folder to train on, the smallest run on it, and that run's directory."""

from __future__ import annotations

import pytest
from pictures import make_pictures
from runs import TINY

from mnv2_fused import trainer


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture
def config(pictures, tmp_path):
    """A run of two epochs of three steps."""
    return trainer.Config(data=pictures, output=str(tmp_path / "out"), **TINY)


@pytest.fixture(scope="session")
def trained(pictures, tmp_path_factory):
    """The directory of the run that `config` asks for, uninterrupted."""
    output = tmp_path_factory.mktemp("trained") / "out"
    trainer.train(trainer.Config(data=pictures, output=str(output), **TINY))
    return output
