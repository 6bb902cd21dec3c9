"""Classifies an image: ``python examples/classify.py [IMAGE [WEIGHTS]]``.

WEIGHTS is a .pth or .safetensors file with torchvision's key names, or the name of a published checkpoint. Without
arguments the image is noise and the weights are random, so the answer means nothing.
"""

import sys

import torch
from PIL import Image

import mnv2_fused
from mnv2_fused import weights
from mnv2_fused.data import images

if len(sys.argv) > 2:
    model, convention = weights.load_model(sys.argv[2])
else:
    torch.manual_seed(0)
    model, convention = mnv2_fused.MobileNetV2().eval(), weights.TORCHVISION
    weights.randomize_batch_norm(model)  # as if it had been trained
image = images.read(sys.argv[1]) if len(sys.argv) > 1 else Image.effect_noise((320, 240), 64).convert("RGB")
x = images.prepare(image, convention).unsqueeze(0)  # resized, cropped and normalised as the weights expect

mnv2_fused.freeze(model)  # its weights do not change from here on
with torch.inference_mode():
    probabilities = model(x).softmax(1)[0]
    model.fused = False  # plain PyTorch from here on
    difference = (model(x).softmax(1)[0] - probabilities).abs().max()

for probability, index in zip(*probabilities.topk(3), strict=True):
    print(f"class {index:4d}: {probability:6.1%}")
print(f"largest difference from plain PyTorch: {difference:.1e}")
