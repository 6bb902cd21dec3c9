"""MobileNetV2's inverted-residual block as one fused operator, in a MobileNetV2 that is otherwise torchvision's."""

from mnv2_fused import export, functional
from mnv2_fused._core import flops as _flops  # noqa: F401
from mnv2_fused._core import library as _library  # loads the operators
from mnv2_fused._core import registrations as _registrations  # noqa: F401
from mnv2_fused.builders import (
    deeplabv3_mobilenet_v2,
    lraspp_mobilenet_v2,
    mobilenet_v2,
    ssdlite320_mobilenet_v2,
)
from mnv2_fused.convert import convert, revert
from mnv2_fused.explain import explain
from mnv2_fused.freezing import freeze, thaw
from mnv2_fused.functional import inverted_residual
from mnv2_fused.models.deeplab import DeepLabV3, multiscale
from mnv2_fused.models.layers import Conv2dNormActivation
from mnv2_fused.models.mobilenet_v2 import MobileNetV2
from mnv2_fused.models.units import InvertedResidual
from mnv2_fused.profiling import unit_by_unit

__version__ = _library._C.build_info()["version"]

__all__ = [
    "Conv2dNormActivation",
    "DeepLabV3",
    "InvertedResidual",
    "MobileNetV2",
    "__version__",
    "convert",
    "deeplabv3_mobilenet_v2",
    "explain",
    "export",
    "freeze",
    "functional",
    "inverted_residual",
    "lraspp_mobilenet_v2",
    "mobilenet_v2",
    "multiscale",
    "revert",
    "ssdlite320_mobilenet_v2",
    "thaw",
    "unit_by_unit",
]
