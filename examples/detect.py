"""Finds objects and draws their boxes: ``python examples/detect.py [IMAGE] [--weights FILE] [--output boxed.png]``.

FILE holds weights of SSDLite with torchvision's key names. Without it the weights are random, and without IMAGE the
image is noise, so the boxes mean nothing.
"""

import argparse

import torch
from PIL import Image, ImageDraw

import mnv2_fused
from mnv2_fused import weights
from mnv2_fused.data import images

parser = argparse.ArgumentParser()
parser.add_argument("image", nargs="?")
parser.add_argument("--weights")
parser.add_argument("--output", default="boxed.png")
parser.add_argument("--over", type=float, default=0.3, help="smallest score")
arguments = parser.parse_args()

torch.manual_seed(0)
model = mnv2_fused.ssdlite320_mobilenet_v2(arguments.weights).eval()
if arguments.weights is None:
    weights.randomize_batch_norm(model)  # as if it had been trained
image = images.read(arguments.image) if arguments.image else Image.effect_noise((320, 240), 64).convert("RGB")
x = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)

mnv2_fused.freeze(model)  # its weights do not change from here on
with torch.inference_mode():
    found = model([x.permute(2, 0, 1) / 255])[0]
draw = ImageDraw.Draw(image)
for box, score, label in zip(found["boxes"].tolist(), found["scores"], found["labels"], strict=True):
    if score > arguments.over:
        print(f"class {label}: {score:.1%} at {', '.join(f'{side:.0f}' for side in box)}")
        draw.rectangle(box, outline="red", width=2)
        draw.text((box[0] + 4, box[1] + 2), f"{label}: {score:.0%}", fill="red")
image.save(arguments.output)
