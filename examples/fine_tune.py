"""Trains a small network to tell horizontal stripes from vertical ones: ``python examples/fine_tune.py [WEIGHTS]``.

WEIGHTS is a file of MobileNetV2 weights to start from; without it the network starts at random.
"""

import sys

import torch

import mnv2_fused


def stripes(count):
    """Noisy images (count, 3, 64, 64) and their labels: 0 is horizontal, 1 is vertical."""
    labels = torch.randint(2, (count,))
    waves = torch.sin(torch.arange(64) * torch.empty(count, 1).uniform_(0.5, 1.5))
    images = waves[:, None, :, None].repeat(1, 3, 1, 64)
    images[labels == 1] = images[labels == 1].transpose(2, 3)
    return (images + 0.5 * torch.randn_like(images)).to(memory_format=torch.channels_last), labels


torch.manual_seed(0)
model = mnv2_fused.mobilenet_v2(weights=sys.argv[1]) if len(sys.argv) > 1 else mnv2_fused.MobileNetV2(width_mult=0.35)
model.classifier[1] = torch.nn.Linear(model.last_channel, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)  # running statistics need small steps at the end
for step in range(1, 61):
    images, labels = stripes(32)
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 15 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

model.eval()
images, labels = stripes(256)
with torch.inference_mode():
    print(f"accuracy on new images: {(model(images).argmax(1) == labels).float().mean():.0%}")
