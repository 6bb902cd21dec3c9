"""MobileNetV2's inverted-residual block as one fused operator, behind a MobileNetV2 that is otherwise torchvision's."""

from . import _library as _library  # first: the operators
from . import _registrations as _registrations
from . import ops
from .convert import convert, explain, revert
from .model import MobileNetV2, mobilenet_v2
from .modules import Conv2dNormActivation, InvertedResidual
from .ops import inverted_residual

__version__ = _library._C.build_info()["version"]

__all__ = [
    "Conv2dNormActivation",
    "InvertedResidual",
    "MobileNetV2",
    "__version__",
    "convert",
    "explain",
    "inverted_residual",
    "mobilenet_v2",
    "ops",
    "revert",
]
