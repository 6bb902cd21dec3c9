"""Collects the feature maps that a detector or a segmentation network reads, at strides 2 to 16."""

import torch

import mnv2_fused

torch.manual_seed(0)
model = mnv2_fused.MobileNetV2(output_stride=16).eval()  # the last stage dilates instead of striding
image = torch.randn(1, 3, 256, 320).to(memory_format=torch.channels_last)

maps = {}
x = image
with torch.inference_mode():
    for name, unit in model.features[:-1].named_children():  # the last convolution is the classifier's
        x = unit(x)
        maps[image.shape[2] // x.shape[2]] = (name, x)  # the last map of each stride
    reasons = mnv2_fused.explain(model)

for stride, (name, feature) in maps.items():
    reason = reasons[f"features.{name}"]
    print(f"stride {stride:2d}: features.{name:2} gives {tuple(feature.shape)}, {reason or 'fused'}")
