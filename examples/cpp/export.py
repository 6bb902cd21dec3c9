"""Packages a model for the C++ program beside this file: python export.py model.pt2 [weights]"""

import sys

import torch

import mnv2_fused

path, *weights = sys.argv[1:]
if weights:
    model = mnv2_fused.mobilenet_v2(weights=weights[0]).eval()
else:
    torch.manual_seed(0)
    model = mnv2_fused.MobileNetV2(num_classes=10).eval()

x = torch.arange(3 * 224 * 224).div(3 * 112 * 224).sub(1).view(1, 3, 224, 224)
x = x.contiguous(memory_format=torch.channels_last)
program = torch.export.export(model, (x,))
torch._inductor.aoti_compile_and_package(program, package_path=path)

with torch.inference_mode():
    values, classes = model(x)[0].topk(3)
for value, label in zip(values.tolist(), classes.tolist(), strict=True):
    print(f"class {label}: {value:.9g}")
