"""Converts a torchvision MobileNetV2 in place, and measures what that changes."""

import time

import torch
import torchvision

import mnv2_fused


def milliseconds(model, x):
    """The best of ten calls."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


torch.manual_seed(0)
model = torchvision.models.mobilenet_v2().eval()  # weights="DEFAULT" downloads trained ones
x = torch.randn(1, 3, 224, 224).to(memory_format=torch.channels_last)

with torch.inference_mode():
    plain, before = model(x), milliseconds(model, x)
    mnv2_fused.freeze(mnv2_fused.convert(model))  # its weights do not change while it is measured
    fused, after = model(x), milliseconds(model, x)
    print(mnv2_fused.explain(model))

print(f"\ntorchvision {before:.1f} ms, converted {after:.1f} ms")
print(f"largest difference {(fused - plain).abs().max():.1e} of values up to {plain.abs().max():.1e}")
mnv2_fused.revert(model)
print(f"reverted to {type(model).__module__}.{type(model).__name__}")
