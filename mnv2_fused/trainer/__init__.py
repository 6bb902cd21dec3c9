"""Training MobileNetV2 on image folders or digits, SSDLite on boxes and DeepLabv3 on masks, with resumable checkpoints.

A run is a function of its `Config`: initial weights, order of the images and augmentation follow from the seed alone,
with fused units and without, and a resumed run goes on exactly where it stopped.
"""

from mnv2_fused.trainer.config import OPTIMIZERS, Config, TrainError
from mnv2_fused.trainer.curves import CURVES
from mnv2_fused.trainer.files import CHECKPOINT, LABELS, LOG, MODEL
from mnv2_fused.trainer.loop import Interrupted, Progress, Trainer, train
from mnv2_fused.trainer.processes import OtherProcessError

__all__ = [
    "CHECKPOINT",
    "CURVES",
    "LABELS",
    "LOG",
    "MODEL",
    "OPTIMIZERS",
    "Config",
    "Interrupted",
    "OtherProcessError",
    "Progress",
    "TrainError",
    "Trainer",
    "train",
]
