"""Segments an image: ``python examples/segment.py [IMAGE WEIGHTS [MASK.png]]``.

WEIGHTS is a file for `deeplabv3_mobilenet_v2`. Without arguments the image is noise and the weights are random, so the
answer means nothing.
"""

import sys

import torch
from PIL import Image

import mnv2_fused
from mnv2_fused import weights
from mnv2_fused.data import images

if len(sys.argv) > 2:
    model = mnv2_fused.deeplabv3_mobilenet_v2(sys.argv[2]).eval()
    image = images.read(sys.argv[1])
else:
    torch.manual_seed(0)
    model = mnv2_fused.deeplabv3_mobilenet_v2(width_mult=0.35).eval()
    weights.randomize_batch_norm(model)  # as if it had been trained
    image = Image.effect_noise((320, 240), 64).convert("RGB")
x = images.prepare(image, model.preprocessing).unsqueeze(0)  # resized and normalised as the weights expect

with torch.inference_mode():
    mask = model.predict_mask(x, (image.height, image.width))[0]
    model.fused = False  # plain PyTorch from here on
    plain = model.predict_mask(x, (image.height, image.width))[0]

for index, pixels in enumerate(mask.flatten().bincount().tolist()):
    if pixels > 0:
        print(f"class {index:3d}: {pixels / mask.numel():6.1%} of the pixels")
print(f"same as plain PyTorch: {(mask == plain).float().mean():.2%}")
if len(sys.argv) > 3:
    coloured = Image.fromarray(mask.byte().numpy())
    colours = [(37 * i % 256, 97 * i % 256, 173 * i % 256) for i in range(256)]
    coloured.putpalette([value for colour in colours for value in colour])
    coloured.save(sys.argv[3])
    print(f"wrote {sys.argv[3]}")
