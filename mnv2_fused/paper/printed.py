"""What the paper prints: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, arXiv:1801.04381.

Every number of Tables 3, 4, 6 and 7 was compared with two transcriptions of the paper's text. Figure 5 is a picture
without numbers; its points are the authors' checkpoints, as github.com/tensorflow/models lists them in
research/slim/nets/mobilenet/README.md.

Parameters and multiply-adds are plain numbers with the digits that are printed, latencies milliseconds on one large
core of a Pixel 1 with TF-Lite, accuracies percent. None: the paper prints nothing.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "arXiv:1801.04381"
POINTS = "github.com/tensorflow/models, research/slim/nets/mobilenet/README.md"


class Line(NamedTuple):
    """A network in Table 4 (top-1 on ImageNet), 6 (mAP on COCO) or 7 (mIOU on PASCAL VOC 2012)."""

    accuracy: float
    parameters: float
    multiply_adds: float
    milliseconds: float | None = None


# Channels, and kilobytes in 16 bits, of the largest tensor at each resolution. The largest of all: (None, kilobytes).
TABLE_3 = {
    "MobileNetV1": {
        112: (64, 1600),
        56: (128, 800),
        28: (256, 400),
        14: (512, 200),
        7: (1024, 199),
        1: (1024, 2),
        "max": (None, 1600),
    },
    "MobileNetV2": {
        112: (16, 400),
        56: (32, 200),
        28: (64, 100),
        14: (160, 62),
        7: (320, 32),
        1: (1280, 2),
        "max": (None, 400),
    },
    "ShuffleNet (x2)": {
        112: (32, 800),
        56: (48, 300),
        28: (400, 600),
        14: (800, 310),
        7: (1600, 156),
        1: (1600, 3),
        "max": (None, 600),
    },
}

TABLE_4 = {
    "MobileNetV1": Line(70.6, 4.2e6, 575e6, 113),
    "ShuffleNet (1.5)": Line(71.5, 3.4e6, 292e6),
    "ShuffleNet (x2)": Line(73.7, 5.4e6, 524e6),
    "NasNet-A": Line(74.0, 5.3e6, 564e6, 183),
    "MobileNetV2": Line(72.0, 3.4e6, 300e6, 75),
    "MobileNetV2 (1.4)": Line(74.7, 6.9e6, 585e6, 143),
}

TABLE_6 = {
    "SSD300": Line(23.2, 36.1e6, 35.2e9),
    "SSD512": Line(26.8, 36.1e6, 99.5e9),
    "YOLOv2": Line(21.6, 50.7e6, 17.5e9),
    "MNet V1 + SSDLite": Line(22.2, 5.1e6, 1.3e9, 270),
    "MNet V2 + SSDLite": Line(22.1, 4.3e6, 0.8e9, 200),
}


class Inference(NamedTuple):
    """How a line of Table 7 computes masks."""

    backbone: str
    output_stride: int
    aspp: bool
    several: bool  # several scales, and mirror images


TABLE_7 = {
    Inference("MNet V1", 16, True, False): Line(75.29, 11.15e6, 14.25e9),
    Inference("MNet V1", 8, True, True): Line(78.56, 11.15e6, 941.9e9),
    Inference("MNet V2", 16, True, False): Line(75.70, 4.52e6, 5.8e9),
    Inference("MNet V2", 8, True, True): Line(78.42, 4.52e6, 387e9),
    Inference("MNet V2", 16, False, False): Line(75.32, 2.11e6, 2.75e9),
    Inference("MNet V2", 8, False, True): Line(77.33, 2.11e6, 152.6e9),
    Inference("ResNet-101", 16, True, False): Line(80.49, 58.16e6, 81.0e9),
    Inference("ResNet-101", 8, True, True): Line(82.70, 58.16e6, 4870.6e9),
}

# By width multiplier and resolution.
FIGURE_5 = {
    (1.4, 224): Line(75.0, 6.06e6, 582e6, 138.0),
    (1.3, 224): Line(74.4, 5.34e6, 509e6, 123.0),
    (1.0, 224): Line(71.8, 3.47e6, 300e6, 73.8),
    (1.0, 192): Line(70.7, 3.47e6, 221e6, 55.1),
    (1.0, 160): Line(68.8, 3.47e6, 154e6, 40.2),
    (1.0, 128): Line(65.3, 3.47e6, 99e6, 27.6),
    (1.0, 96): Line(60.3, 3.47e6, 56e6, 17.6),
    (0.75, 224): Line(69.8, 2.61e6, 209e6, 55.8),
    (0.75, 192): Line(68.7, 2.61e6, 153e6, 41.6),
    (0.75, 160): Line(66.4, 2.61e6, 107e6, 30.4),
    (0.75, 128): Line(63.2, 2.61e6, 69e6, 21.9),
    (0.75, 96): Line(58.8, 2.61e6, 39e6, 14.2),
    (0.5, 224): Line(65.4, 1.95e6, 97e6, 28.7),
    (0.5, 192): Line(63.9, 1.95e6, 71e6, 21.1),
    (0.5, 160): Line(61.0, 1.95e6, 50e6, 14.9),
    (0.5, 128): Line(57.7, 1.95e6, 32e6, 9.9),
    (0.5, 96): Line(51.2, 1.95e6, 18e6, 6.4),
    (0.35, 224): Line(60.3, 1.66e6, 59e6, 19.7),
    (0.35, 192): Line(58.2, 1.66e6, 43e6, 14.6),
    (0.35, 160): Line(55.7, 1.66e6, 30e6, 10.5),
    (0.35, 128): Line(50.8, 1.66e6, 20e6, 6.9),
    (0.35, 96): Line(45.5, 1.66e6, 11e6, 4.5),
}
